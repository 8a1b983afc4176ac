//! A TCP port that all reactors of one node share, and no other process does.
//!
//! With SO_REUSEPORT the kernel spreads connections over the listeners of a port, but it also lets a second node of the
//! same user join unnoticed and take half of them. So the first listener binds and listens without the option, which
//! only one process can do, and gets the option afterwards; the others join it. Every node starts this way, so there
//! is no moment at which two get the port. A foreign program that binds with the option from the start can still join.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that the kernel completes before they are accepted; it cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 1_024;

/// A port that this process holds.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    first: Option<TcpListener>,
}

impl Port {
    /// Takes a port; 0 lets the kernel choose one.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = listen(address, false).map_err(|error| {
            let text = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    format!("cannot listen on {address}: another process has this port")
                }
                _ => format!("cannot listen on {address}: {error}"),
            };
            io::Error::new(error.kind(), text)
        })?;
        let address = listener.local_addr()?;
        Ok(Self { address, first: Some(listener) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// One more listener, non-blocking: one for each reactor. The first is to be taken and kept, else the port is open
    /// to others.
    pub fn listener(&mut self) -> io::Result<TcpListener> {
        match self.first.take() {
            Some(listener) => Ok(listener),
            None => listen(self.address, true),
        }
    }
}

fn listen(address: SocketAddr, join: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of an earlier process that linger are no reason to refuse.
    socket.set_reuse_address(true)?;
    if join {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reactors_share_a_port_and_nobody_else_gets_it() {
        let mut port = Port::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = Port::bind(port.address()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("another process has this port"), "{error}");
        let listeners: Vec<TcpListener> = (0..3).map(|_| port.listener().unwrap()).collect();
        assert!(listeners.iter().all(|listener| listener.local_addr().unwrap() == port.address()));
        assert_eq!(Port::bind(port.address()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn every_listener_gets_connections() {
        let mut port = Port::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listeners: Vec<TcpListener> = (0..3).map(|_| port.listener().unwrap()).collect();
        let clients: Vec<_> =
            (0..200).map(|_| std::net::TcpStream::connect(port.address()).unwrap()).collect();
        let counts: Vec<usize> =
            listeners.iter().map(|listener| std::iter::from_fn(|| listener.accept().ok()).count()).collect();
        assert_eq!(counts.iter().sum::<usize>(), clients.len());
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    }
}
