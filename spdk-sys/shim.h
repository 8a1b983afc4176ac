/*
 * SPDK's macros, inline functions, bit fields, variadic callbacks and version differences behind plain functions and
 * structs, so that the Rust side is the same for SPDK 20.07 and 26.01.
 */
#ifndef BASALT_SHIM_H
#define BASALT_SHIM_H

#include "spdk/stdinc.h"
#include "spdk/version.h"
#include "spdk/env.h"
#include "spdk/nvme.h"

/* Everything that the environment is initialised with. */
struct basalt_env_options {
	const char *name;
	/* Hexadecimal mask of the cores that SPDK may think of as its own; it starts no threads on them. */
	const char *core_mask;
	/* MiB of memory. */
	int memory_mib;
	/* Ordinary pages instead of hugepages. */
	bool no_huge;
	/* No PCI bus at all. */
	bool no_pci;
	/* The PCI addresses that may be claimed; the others are not even looked at. */
	const char *const *pci_allowed;
	size_t pci_allowed_count;
};

/* 0, or a negative errno. The affinity of the calling thread stays as it was. */
int basalt_env_init(const struct basalt_env_options *options);

/* One line of SPDK's or DPDK's log. Levels are SPDK's: 0 error, 1 warning, 2 notice, 3 info, 4 debug. */
typedef void (*basalt_log_sink)(int level, const char *text, size_t length);
void basalt_log_to(basalt_log_sink sink);

/* SPDK's version as major * 100 + minor, as in 2601. */
uint32_t basalt_spdk_version(void);

struct basalt_connect_options {
	uint32_t io_queue_size;
	uint32_t io_queue_requests;
	uint32_t io_queue_count;
	uint32_t keep_alive_timeout_ms;
	uint32_t admin_timeout_ms;
	uint8_t transport_retry_count;
};

/* The controller, or NULL. */
struct spdk_nvme_ctrlr *basalt_connect(const struct spdk_nvme_transport_id *id,
				       const struct basalt_connect_options *options);

/* `removed` is called from admin polling when the controller goes away; never before SPDK 21.01, where the failing queues
 * are the only word of it. */
void basalt_removal_register(struct spdk_nvme_ctrlr *controller, spdk_nvme_remove_cb removed, void *context);

/* Whether the controller's slot is being emptied: the kernel wants it back, or it was pulled. Never over a fabric. */
bool basalt_is_removed(struct spdk_nvme_ctrlr *controller);

/* Disables a PCIe controller, while its queue pairs still exist: freeing them then asks nothing of it, which would take long
 * when it does not answer. Other threads may poll them meanwhile. 0 when it is disabled; -ENOTSUP before SPDK 23.01. */
int basalt_disconnect(struct spdk_nvme_ctrlr *controller);
/* Enables it again, when all queue pairs have been freed. 0 or a negative errno. */
int basalt_reconnect(struct spdk_nvme_ctrlr *controller);

struct basalt_controller_info {
	char model[41];
	char serial[21];
	char firmware[9];
	/* NVMe qualified name of the subsystem. */
	char subsystem[224];
	bool volatile_write_cache;
	bool is_fabrics;
	bool deallocate;
	/* Blocks beyond the first that are written atomically across a power failure. */
	uint16_t awupf;
	uint32_t transfer_size_max;
	uint32_t namespace_count;
	/* Entries of the longest queue. */
	uint32_t queue_size_max;
};
void basalt_controller_info(struct spdk_nvme_ctrlr *controller, struct basalt_controller_info *info);

struct basalt_namespace_info {
	uint64_t block_count;
	uint32_t block_size;
	uint32_t metadata_size;
	bool has_protection;
	bool supports_deallocate;
	bool supports_flush;
	/* NSFEAT says that the three that follow are the namespace's own. */
	bool atomic_is_own;
	uint16_t nawupf;
	uint16_t nabspf;
	uint16_t nabo;
	uint32_t transfer_size_max;
	/* Blocks; 0 for none. */
	uint32_t optimal_boundary;
	/* enum spdk_nvme_dealloc_logical_block_read_value */
	uint32_t deallocate_reads_as;
	uint8_t nguid[16];
	uint64_t eui64;
};
void basalt_namespace_info(struct spdk_nvme_ns *ns, struct basalt_namespace_info *info);

/* A queue pair that rings its doorbell once per poll, or NULL. */
struct spdk_nvme_qpair *basalt_queue_pair_alloc(struct spdk_nvme_ctrlr *controller, uint32_t size, uint32_t requests);

/* The status of a completion: type << 8 | code, and bit 16 when it is of no use to try again. 0 is success. */
uint32_t basalt_completion_status(const struct spdk_nvme_cpl *completion);
/* Dword 0 of a completion. */
uint32_t basalt_completion_dword0(const struct spdk_nvme_cpl *completion);

/* Deallocates one range. 0 or a negative errno, as SPDK's own commands. */
int basalt_deallocate(struct spdk_nvme_ns *ns, struct spdk_nvme_qpair *qpair, uint64_t block, uint32_t count,
		      spdk_nvme_cmd_cb done, void *context);

void basalt_timeout_register(struct spdk_nvme_ctrlr *controller, uint64_t io_us, uint64_t admin_us,
			     spdk_nvme_timeout_cb timed_out, void *context);

/* Controller status: bit 0 ready, bit 1 fatal; all ones when it can't be read. */
uint32_t basalt_controller_status(struct spdk_nvme_ctrlr *controller);

/* The parts of the SMART / health page that Basalt shows. */
struct basalt_health {
	uint8_t critical_warning;
	uint16_t temperature_kelvin;
	uint8_t available_spare_percent;
	uint8_t available_spare_threshold_percent;
	uint8_t used_percent;
	uint64_t unsafe_shutdowns;
	uint64_t media_errors;
	uint64_t power_on_hours;
};
/* Bytes of the page that `basalt_health_decode` reads. */
#define BASALT_HEALTH_PAGE_SIZE 512
void basalt_health_decode(const void *page, struct basalt_health *health);

#endif
