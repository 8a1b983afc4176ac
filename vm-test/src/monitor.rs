//! QEMU's monitor: errors, removals and resets while the guest runs (QMP, one JSON object a line).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Result, VmError};

const LIMIT: Duration = Duration::from_secs(60);

/// A connection to the monitor.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects to the socket that QEMU listens on.
    pub fn connect(socket: &Path) -> Result<Monitor> {
        let stream = UnixStream::connect(socket).map_err(VmError::os("connect to QEMU's monitor", socket))?;
        stream.set_read_timeout(Some(LIMIT)).map_err(VmError::os("set a limit on", socket))?;
        let mut monitor = Monitor { stream: BufReader::new(stream), events: Vec::new() };
        monitor.read("its greeting")?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and returns what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let failed = |reply: String| VmError::Monitor { command: command.to_owned(), reply };
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|error| failed(error.to_string()))?;
        loop {
            let mut reply = self.read(command)?;
            if let Some(error) = reply.get("error") {
                return Err(failed(error.to_string()));
            }
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
            self.events.push(reply);
        }
    }

    /// Waits until an event of this name has come, about the device of this name.
    pub fn wait_for(&mut self, event: &str, device: &str) -> Result<()> {
        let is_it = |one: &Value| one["event"] == event && one["data"]["device"] == device;
        let deadline = Instant::now() + LIMIT;
        while !self.events.iter().any(is_it) {
            if Instant::now() > deadline {
                let what = format!("the event {event} of {device}");
                return Err(VmError::TimedOut { what, limit: LIMIT, context: format!("{:?}", self.events) });
            }
            let one = self.read(event)?;
            self.events.push(one);
        }
        self.events.retain(|one| !is_it(one));
        Ok(())
    }

    /// Puts a node that injects errors between a namespace and its drive. `errors` as blkdebug's `inject-error`.
    pub fn inject(&mut self, namespace: &str, errors: Value) -> Result<()> {
        let node = format!("{namespace}-faults");
        let image = format!("{namespace}-drive");
        let blkdebug =
            json!({"driver": "blkdebug", "node-name": node, "image": image, "inject-error": errors});
        self.execute("blockdev-add", blkdebug)?;
        self.set_drive(namespace, &node)
    }

    /// Has a drive take seconds for each operation, until it is healed. Once in a machine's life for each namespace.
    pub fn stall(&mut self, namespace: &str) -> Result<()> {
        let (node, group) = (format!("{namespace}-faults"), format!("{namespace}-stall"));
        // The least that there is: one operation a minute.
        let limits = json!({"iops-total": 1, "iops-size": 512});
        self.execute("object-add", json!({"qom-type": "throttle-group", "id": group, "limits": limits}))?;
        let throttle = json!({
            "driver": "throttle",
            "node-name": node,
            "throttle-group": group,
            "file": format!("{namespace}-drive"),
        });
        self.execute("blockdev-add", throttle)?;
        self.set_drive(namespace, &node)
    }

    /// Takes the errors away again.
    pub fn heal(&mut self, namespace: &str) -> Result<()> {
        self.set_drive(namespace, &format!("{namespace}-drive"))?;
        self.execute("blockdev-del", json!({"node-name": format!("{namespace}-faults")}))?;
        Ok(())
    }

    fn set_drive(&mut self, namespace: &str, node: &str) -> Result<()> {
        let path = format!("/machine/peripheral/{namespace}");
        self.execute("qom-set", json!({"path": path, "property": "drive", "value": node}))?;
        Ok(())
    }

    /// Takes a device out, as a person would after asking the guest: it answers when the guest has let go.
    pub fn remove(&mut self, device: &str) -> Result<()> {
        self.execute("device_del", json!({ "id": device }))?;
        self.wait_for("DEVICE_DELETED", device)
    }

    fn read(&mut self, what: &str) -> Result<Value> {
        let failed = |reply: String| VmError::Monitor { command: what.to_owned(), reply };
        let mut line = String::new();
        let count = self.stream.read_line(&mut line).map_err(|error| failed(error.to_string()))?;
        if count == 0 {
            return Err(failed("the monitor was closed".into()));
        }
        serde_json::from_str(&line).map_err(|error| failed(format!("{error}: {line}")))
    }
}
