#define _GNU_SOURCE
#include "shim.h"

#include <pthread.h>
#include <sched.h>

#include "spdk/env_dpdk.h"
#include "spdk/log.h"
#include "spdk/string.h"

#define IS_AT_LEAST(major, minor) (SPDK_VERSION >= SPDK_VERSION_NUM(major, minor, 0))

/* From librte_eal, whose headers are not part of every installation. */
int rte_eal_init(int argc, char **argv);
int rte_openlog_stream(FILE *stream);

static basalt_log_sink g_sink;

static void
log_line(int level, const char *file, const int line, const char *func, const char *format, va_list args)
{
	char text[1024];
	int length = vsnprintf(text, sizeof(text), format, args);
	(void)file;
	(void)line;
	(void)func;

	if (length < 0) {
		return;
	}
	g_sink(level, text, (size_t)length < sizeof(text) ? (size_t)length : sizeof(text) - 1);
}

/* DPDK writes whole lines to its stream. */
static ssize_t
dpdk_line(void *cookie, const char *text, size_t length)
{
	(void)cookie;
	g_sink(3, text, length);
	return (ssize_t)length;
}

void
basalt_log_to(basalt_log_sink sink)
{
	cookie_io_functions_t functions = { .write = dpdk_line };
	FILE *stream;

	g_sink = sink;
	spdk_log_open(log_line);
	/* The sink filters; this only keeps SPDK from formatting what nobody reads. */
	spdk_log_set_print_level(SPDK_LOG_DISABLED);
	spdk_log_set_level(SPDK_LOG_NOTICE);
	stream = fopencookie(NULL, "w", functions);
	if (stream != NULL) {
		setvbuf(stream, NULL, _IOLBF, 0);
		rte_openlog_stream(stream);
	}
}

uint32_t
basalt_spdk_version(void)
{
	return SPDK_VERSION_MAJOR * 100 + SPDK_VERSION_MINOR;
}

#if !IS_AT_LEAST(21, 1)
/* This version's own initialisation has no word for ordinary pages. */
static int
init_without_hugepages(const struct basalt_env_options *options)
{
	char memory[32];
	char *arguments[] = { (char *)options->name, "-c", (char *)options->core_mask, "-m", memory, "--no-huge",
			      "--legacy-mem", "--iova-mode=va", "--no-pci", "--no-shconf", "--no-telemetry", NULL };
	int count = (int)(sizeof(arguments) / sizeof(arguments[0])) - 1;

	if (!options->no_pci) {
		return -ENOTSUP;
	}
	snprintf(memory, sizeof(memory), "%d", options->memory_mib);
	if (rte_eal_init(count, arguments) < 0) {
		return -EIO;
	}
	return spdk_env_dpdk_post_init(true);
}
#endif

static int
init(const struct basalt_env_options *options)
{
	struct spdk_env_opts opts;
	struct spdk_pci_addr *allowed = NULL;
	size_t i;
	int rc;

	memset(&opts, 0, sizeof(opts));
#if IS_AT_LEAST(24, 1)
	opts.opts_size = sizeof(opts);
#endif
	spdk_env_opts_init(&opts);
	opts.name = options->name;
	opts.core_mask = options->core_mask;
	opts.mem_size = options->memory_mib;
	opts.no_pci = options->no_pci;
	opts.shm_id = -1;
	/* Nothing is left in the hugepage file system by a process that was killed. */
	opts.unlink_hugepage = !options->no_huge;
	if (options->no_huge) {
#if IS_AT_LEAST(21, 1)
		opts.no_huge = true;
#else
		return init_without_hugepages(options);
#endif
	}
	if (options->pci_allowed_count > 0) {
		allowed = calloc(options->pci_allowed_count, sizeof(*allowed));
		if (allowed == NULL) {
			return -ENOMEM;
		}
		for (i = 0; i < options->pci_allowed_count; i++) {
			if (spdk_pci_addr_parse(&allowed[i], options->pci_allowed[i]) != 0) {
				free(allowed);
				return -EINVAL;
			}
		}
		opts.num_pci_addr = options->pci_allowed_count;
#if IS_AT_LEAST(20, 10)
		opts.pci_allowed = allowed;
#else
		opts.pci_whitelist = allowed;
#endif
	}
	rc = spdk_env_init(&opts);
	/* The addresses have become arguments of DPDK, as text. */
	free(allowed);
	return rc;
}

int
basalt_env_init(const struct basalt_env_options *options)
{
	cpu_set_t before;
	int saved = pthread_getaffinity_np(pthread_self(), sizeof(before), &before);
	int rc = init(options);

	/* DPDK pins the thread that initialises it to the first core of the mask. */
	if (saved == 0) {
		pthread_setaffinity_np(pthread_self(), sizeof(before), &before);
	}
	return rc;
}

struct spdk_nvme_ctrlr *
basalt_connect(const struct spdk_nvme_transport_id *id, const struct basalt_connect_options *options)
{
	struct spdk_nvme_ctrlr_opts opts;

	spdk_nvme_ctrlr_get_default_ctrlr_opts(&opts, sizeof(opts));
	opts.io_queue_size = options->io_queue_size;
	opts.io_queue_requests = options->io_queue_requests;
	opts.num_io_queues = options->io_queue_count;
	opts.keep_alive_timeout_ms = options->keep_alive_timeout_ms;
	opts.admin_timeout_ms = options->admin_timeout_ms;
	opts.transport_retry_count = options->transport_retry_count;
	/* Each command's status comes to who sent it; after a reset that would be hundreds of lines. */
	opts.disable_error_logging = true;
#if IS_AT_LEAST(21, 10)
	/* The default of half a second is short for a target that shares a busy core. */
	opts.fabrics_connect_timeout_us = (uint64_t)options->admin_timeout_ms * 1000;
#endif
	return spdk_nvme_connect(id, &opts, sizeof(opts));
}

void
basalt_removal_register(struct spdk_nvme_ctrlr *controller, spdk_nvme_remove_cb removed, void *context)
{
#if IS_AT_LEAST(21, 1)
	spdk_nvme_ctrlr_set_remove_cb(controller, removed, context);
#else
	(void)controller;
	(void)removed;
	(void)context;
#endif
}

bool
basalt_is_removed(struct spdk_nvme_ctrlr *controller)
{
	struct spdk_pci_device *device = spdk_nvme_ctrlr_get_pci_device(controller);

	return device != NULL && spdk_pci_device_is_removed(device);
}

int
basalt_disconnect(struct spdk_nvme_ctrlr *controller)
{
#if IS_AT_LEAST(23, 1)
	int rc = spdk_nvme_ctrlr_disconnect(controller);

	/* SPDK bounds the time, by what the controller says that disabling may take. */
	while (rc >= 0) {
		rc = spdk_nvme_ctrlr_process_admin_completions(controller);
	}
	return rc == -ENXIO ? 0 : rc;
#else
	(void)controller;
	return -ENOTSUP;
#endif
}

int
basalt_reconnect(struct spdk_nvme_ctrlr *controller)
{
#if IS_AT_LEAST(23, 1)
	int rc;

	spdk_nvme_ctrlr_reconnect_async(controller);
	do {
		rc = spdk_nvme_ctrlr_reconnect_poll_async(controller);
	} while (rc == -EAGAIN);
	return rc;
#else
	(void)controller;
	return -ENOTSUP;
#endif
}

/* Copies a space-padded identify field. */
static void
copy_text(char *to, const int8_t *from, size_t size)
{
	memcpy(to, from, size);
	to[size] = '\0';
	while (size > 0 && (to[size - 1] == ' ' || to[size - 1] == '\0')) {
		to[--size] = '\0';
	}
}

void
basalt_controller_info(struct spdk_nvme_ctrlr *controller, struct basalt_controller_info *info)
{
	const struct spdk_nvme_ctrlr_data *data = spdk_nvme_ctrlr_get_data(controller);
	const struct spdk_nvme_transport_id *id = spdk_nvme_ctrlr_get_transport_id(controller);

	memset(info, 0, sizeof(*info));
	copy_text(info->model, data->mn, sizeof(data->mn));
	copy_text(info->serial, data->sn, sizeof(data->sn));
	copy_text(info->firmware, (const int8_t *)data->fr, sizeof(data->fr));
	/* Terminated where it is shorter than its field, and by the memset where it is not. */
	memcpy(info->subsystem, data->subnqn, sizeof(info->subsystem) - 1);
	info->volatile_write_cache = data->vwc.present;
	info->is_fabrics = id->trtype != SPDK_NVME_TRANSPORT_PCIE;
	info->deallocate = data->oncs.dsm;
	info->awupf = data->awupf;
	info->transfer_size_max = spdk_nvme_ctrlr_get_max_xfer_size(controller);
	info->queue_size_max = (uint32_t)spdk_nvme_ctrlr_get_regs_cap(controller).bits.mqes + 1;
	info->namespace_count = spdk_nvme_ctrlr_get_num_ns(controller);
}

void
basalt_namespace_info(struct spdk_nvme_ns *ns, struct basalt_namespace_info *info)
{
	const struct spdk_nvme_ns_data *data = spdk_nvme_ns_get_data(ns);
	uint32_t flags = spdk_nvme_ns_get_flags(ns);

	memset(info, 0, sizeof(*info));
	info->block_count = spdk_nvme_ns_get_num_sectors(ns);
	info->block_size = spdk_nvme_ns_get_sector_size(ns);
	info->metadata_size = spdk_nvme_ns_get_md_size(ns);
	info->has_protection = spdk_nvme_ns_get_pi_type(ns) != SPDK_NVME_FMT_NVM_PROTECTION_DISABLE;
	info->supports_deallocate = (flags & SPDK_NVME_NS_DEALLOCATE_SUPPORTED) != 0;
	info->supports_flush = (flags & SPDK_NVME_NS_FLUSH_SUPPORTED) != 0;
	info->atomic_is_own = data->nsfeat.ns_atomic_write_unit;
	info->nawupf = data->nawupf;
	info->nabspf = data->nabspf;
	info->nabo = data->nabo;
	info->transfer_size_max = spdk_nvme_ns_get_max_io_xfer_size(ns);
	info->optimal_boundary = spdk_nvme_ns_get_optimal_io_boundary(ns);
	info->deallocate_reads_as = (uint32_t)spdk_nvme_ns_get_dealloc_logical_block_read_value(ns);
	memcpy(info->nguid, data->nguid, sizeof(info->nguid));
	memcpy(&info->eui64, &data->eui64, sizeof(info->eui64));
}

struct spdk_nvme_qpair *
basalt_queue_pair_alloc(struct spdk_nvme_ctrlr *controller, uint32_t size, uint32_t requests)
{
	struct spdk_nvme_io_qpair_opts opts;

	spdk_nvme_ctrlr_get_default_io_qpair_opts(controller, &opts, sizeof(opts));
	opts.io_queue_size = size;
	opts.io_queue_requests = requests;
	opts.delay_cmd_submit = true;
	return spdk_nvme_ctrlr_alloc_io_qpair(controller, &opts, sizeof(opts));
}

uint32_t
basalt_completion_status(const struct spdk_nvme_cpl *completion)
{
	uint32_t status = (uint32_t)completion->status.sct << 8 | completion->status.sc;

	return status == 0 ? 0 : status | (uint32_t)completion->status.dnr << 16;
}

uint32_t
basalt_completion_dword0(const struct spdk_nvme_cpl *completion)
{
	return completion->cdw0;
}

int
basalt_deallocate(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, uint64_t block, uint32_t count,
		  spdk_nvme_cmd_cb done, void *context)
{
	struct spdk_nvme_dsm_range range;

	memset(&range, 0, sizeof(range));
	range.starting_lba = block;
	range.length = count;
	return spdk_nvme_ns_cmd_dataset_management(ns, qpair, SPDK_NVME_DSM_ATTR_DEALLOCATE, &range, 1, done, context);
}

void
basalt_timeout_register(struct spdk_nvme_ctrlr *controller, uint64_t io_us, uint64_t admin_us,
			spdk_nvme_timeout_cb timed_out, void *context)
{
#if IS_AT_LEAST(21, 7)
	spdk_nvme_ctrlr_register_timeout_callback(controller, io_us, admin_us, timed_out, context);
#else
	/* One figure for both: the longer one. */
	spdk_nvme_ctrlr_register_timeout_callback(controller, io_us > admin_us ? io_us : admin_us, timed_out, context);
#endif
}

uint32_t
basalt_controller_status(struct spdk_nvme_ctrlr *controller)
{
	return spdk_nvme_ctrlr_get_regs_csts(controller).raw;
}

static uint64_t
low_half(const uint8_t *from)
{
	uint64_t value;

	memcpy(&value, from, sizeof(value));
	return value;
}

void
basalt_health_decode(const void *page, struct basalt_health *health)
{
	/* NVM Express Base Specification, SMART / Health Information log page. */
	const uint8_t *bytes = page;

	health->critical_warning = bytes[0];
	health->temperature_kelvin = (uint16_t)(bytes[1] | bytes[2] << 8);
	health->available_spare_percent = bytes[3];
	health->available_spare_threshold_percent = bytes[4];
	health->used_percent = bytes[5];
	health->power_on_hours = low_half(bytes + 128);
	health->unsafe_shutdowns = low_half(bytes + 144);
	health->media_errors = low_half(bytes + 160);
}
