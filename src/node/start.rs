//! From shard states to a running node, and its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use super::memory::MemoryPlan;
use super::reactor::NodeReactor;
use super::shared::{Control, DeviceFacts, Recovery, Shared};
use super::{Client, NodeConfig, NodeError, Opened, ShardAnswer, ShardRequest};
use crate::device::{Device, Namespace};
use crate::engine::io_queue::cost::ASSUMED;
use crate::engine::io_queue::{Activity, IoSettings};
use crate::engine::{Engine, ShardState};
use crate::limits::MAILBOX_RING_CAPACITY;
use crate::net::port::Port;
use crate::reactor::control;
use crate::reactor::thread::{ReactorThread, spawn};
use crate::reactor::{Sleeper, mesh_with_clients, run};
use crate::size;

/// Control messages that may wait for one reactor.
const CONTROL_CAPACITY: usize = 64;

/// A running node.
pub struct Node {
    shared: Arc<Shared>,
    threads: Vec<ReactorThread<Result<(), NodeError>>>,
    stop_requests: Receiver<bool>,
    stop_sender: Sender<bool>,
    clients: Vec<Client>,
    device: String,
}

/// Starts the reactors of a node on an opened device. With a port, it serves Redis clients. Returns when every reactor has
/// made its recovery durable and takes requests.
pub fn start<N: Namespace>(
    opened: Opened<N>,
    port: Option<&mut Port>,
    config: &NodeConfig,
) -> Result<Node, NodeError> {
    let recovery = Recovery {
        checkpoint_bytes: opened.checkpoint_bytes,
        log_bytes: opened.log_bytes,
        duration_ms: opened.duration.as_millis() as u64,
        damage_count: opened.damage_count,
    };
    let Opened { namespace, superblock, allocator, states, .. } = opened;
    let reactor_count = config.cores.len();
    let plan = MemoryPlan::new(config.memory_size_max, reactor_count);
    let index_size: u64 = states.iter().map(ShardState::index_size).sum();
    if index_size > plan.index_size_max() {
        return Err(NodeError::Memory {
            device: namespace.name().to_owned(),
            keys: states.iter().map(ShardState::key_count).sum(),
            index: size::show(index_size),
            size_max: size::show(plan.size_max),
            needed: format!("{}MiB", ((index_size * 2) >> 20) + 1),
        });
    }
    let device = namespace.name().to_owned();
    let address = port.as_ref().map(|port| port.address());
    // Weak: who still looks at figures must not keep the device claimed.
    let asked = Arc::downgrade(&namespace);
    let facts = DeviceFacts {
        name: device.clone(),
        engine: namespace.geometry().engine,
        health: Box::new(move || asked.upgrade().and_then(|namespace| namespace.health())),
        scheduler: config.io_policy,
        profile: config.io_profile_source,
    };
    let shared =
        Shared::new(Arc::clone(&superblock), Arc::clone(&allocator), facts, recovery, address, config);
    let shared = Arc::new(shared);

    let (mut ends, mut client_ends) = mesh_with_clients::<ShardRequest, ShardAnswer>(
        reactor_count,
        config.client_count,
        MAILBOX_RING_CAPACITY,
    )
    .map_err(|error| NodeError::Os {
        action: "create the mailboxes of clients",
        source: error.source.into(),
    })?;
    let mut sleepers = Vec::new();
    for _ in 0..reactor_count {
        let sleeper = Sleeper::new()
            .map_err(|error| NodeError::Os { action: error.action, source: error.source.into() })?;
        sleepers.push(sleeper);
    }
    let wakers: Vec<_> = sleepers.iter().map(Sleeper::waker).collect();
    for end in &mut ends {
        end.connect(&wakers);
    }
    for end in &mut client_ends {
        end.connect(&wakers);
    }
    let (stop_sender, stop_requests) = mpsc::channel();
    let (controls, mut receivers): (Vec<_>, Vec<_>) =
        wakers.iter().map(|waker| control::channel::<Control>(CONTROL_CAPACITY, waker.clone())).unzip();
    shared.connect(controls, stop_sender.clone());

    let mut states_of: BTreeMap<usize, Vec<ShardState>> = BTreeMap::new();
    for state in states {
        states_of.entry(shared.reactor_of(state.id())).or_default().push(state);
    }
    let io = IoSettings {
        policy: config.io_policy,
        profile: config.io_profile.clone().unwrap_or(ASSUMED),
        queue_count: reactor_count as u32,
        activity: Arc::<Activity>::default(),
    };
    let mut listeners = Vec::new();
    if let Some(port) = port {
        for _ in 0..reactor_count {
            let listener = port.listener().map_err(|source| NodeError::Os { action: "listen", source })?;
            listeners.push(Some(listener));
        }
    }
    listeners.resize_with(reactor_count, || None);

    let (ready, readiness) = mpsc::channel::<Result<(), NodeError>>();
    let mut threads = Vec::new();
    let parts = ends.into_iter().zip(sleepers).zip(receivers.drain(..)).zip(listeners);
    for (index, (((end, mut sleeper), control), listener)) in parts.enumerate() {
        let states = states_of.remove(&index).unwrap_or_default();
        let (shared, namespace, ready) = (Arc::clone(&shared), Arc::clone(&namespace), ready.clone());
        let (durability, trim, spin) = (config.durability, config.trim, config.spin);
        let checkpoint_interval = config.checkpoint_interval;
        let scrub_rate = config.scrub_rate.div_ceil(reactor_count as u64);
        let io = io.clone();
        let body = move || {
            let made = (|| {
                let queue = namespace.open_queue()?;
                let (superblock, allocator) = (Arc::clone(&shared.superblock), Arc::clone(&shared.allocator));
                let mut engine = Engine::new(superblock, allocator, queue, states, durability);
                engine.set_io(&io);
                // Set once: a reactor has one engine.
                let _ = shared.figures[index].io_bounds.set(engine.io_bounds());
                // A drive works better with free blocks; a file would only lose blocks that it must then find again.
                let is_controller = engine.device().geometry().engine == "spdk";
                let by_size = crate::engine::checkpoint::interval_of(engine.device().geometry().size());
                engine.set_checkpoint_interval(checkpoint_interval.unwrap_or(by_size));
                engine.set_trim(trim.unwrap_or(is_controller));
                engine
                    .settle(shared.clock())
                    .map_err(|source| NodeError::Settle { device: shared.device.name.clone(), source })?;
                engine.set_scrub_rate(scrub_rate);
                NodeReactor::new(Arc::clone(&shared), engine, end, control, listener, sleeper.poller())
                    .map_err(|source| NodeError::Os { action: "watch sockets", source })
            })();
            let mut reactor = match made {
                Ok(reactor) => reactor,
                Err(error) => {
                    // The starter waits for one message of each reactor and reports this one.
                    let _ = ready.send(Err(error));
                    return Err(NodeError::ReactorEnded);
                }
            };
            let _ = ready.send(Ok(()));
            drop(ready);
            run(&mut reactor, &mut sleeper, spin)
                .map(|_stats| ())
                .map_err(|error| NodeError::Os { action: error.action, source: error.source.into() })
        };
        threads.push(spawn(index, config.cores[index], "reactor", body)?);
    }
    drop(ready);
    let clients = client_ends
        .into_iter()
        .enumerate()
        .map(|(at, end)| Client::new(end, Arc::clone(&shared), reactor_count + at))
        .collect();
    let node = Node { shared, threads, stop_requests, stop_sender, clients, device };
    for _ in 0..reactor_count {
        match readiness.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                node.stop_reactors(false);
                return Err(error);
            }
            Err(_) => return Err(NodeError::ReactorEnded),
        }
    }
    Ok(node)
}

impl Node {
    /// State and figures.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// One of the in-process callers that the configuration asked for.
    pub fn take_client(&mut self) -> Option<Client> {
        self.clients.pop()
    }

    /// Whoever sends on this asks the node to stop; `true` makes everything durable first.
    pub fn stop_sender(&self) -> Sender<bool> {
        self.stop_sender.clone()
    }

    /// Waits until somebody asks for a stop (a signal handler, a client's SHUTDOWN) or a reactor ends by itself, stops
    /// everything and returns.
    pub fn run(self) -> Result<(), NodeError> {
        let save = loop {
            match self.stop_requests.recv_timeout(Duration::from_millis(500)) {
                Ok(save) => break save,
                Err(mpsc::RecvTimeoutError::Disconnected) => break true,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    if self.threads.iter().any(ReactorThread::is_finished) {
                        // Its shards are gone: the others could only wait for it for ever.
                        return Err(NodeError::ReactorEnded);
                    }
                }
            }
        };
        self.stop(save)
    }

    /// Stops everything. With `save`, what was acknowledged is made durable and the device is marked as cleanly stopped.
    pub fn stop(self, save: bool) -> Result<(), NodeError> {
        self.stop_reactors(save);
        let mut result = Ok(());
        for thread in self.threads {
            let ended = thread.join().unwrap_or(Err(NodeError::ReactorEnded));
            result = result.and(ended);
        }
        if result.is_ok() && self.shared.failed.load(std::sync::atomic::Ordering::Acquire) {
            let source =
                crate::engine::op::OpError::OutcomeUnknown { detail: "the last flush failed".into() };
            return Err(NodeError::Settle { device: self.device, source });
        }
        result
    }

    fn stop_reactors(&self, save: bool) {
        self.shared.tell(Control::Stop { save });
    }
}
