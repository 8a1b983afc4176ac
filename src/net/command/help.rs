//! HELP of the commands that have subcommands: unknown ones are answered with the advice to ask for it.

use crate::net::resp::Response;

/// What a subcommand is called with, and what it does.
pub type Usage = (&'static str, &'static str);

/// Those of CLIENT.
pub const CLIENT: &[Usage] = &[
    ("GETNAME", "The name of this connection."),
    ("ID", "The number of this connection."),
    ("INFO", "What is known of this connection."),
    ("NO-EVICT (ON|OFF)", "Accepted, and changes nothing."),
    ("NO-TOUCH (ON|OFF)", "Accepted, and changes nothing."),
    ("SETINFO (LIB-NAME|LIB-VER) <value>", "Accepted, and changes nothing."),
    ("SETNAME <name>", "Gives this connection a name."),
];

/// Those of COMMAND.
pub const COMMAND: &[Usage] = &[
    ("COUNT", "How many commands there are."),
    ("DOCS [<name> ...]", "What these commands are for, or all."),
    ("GETKEYS <command> [<argument> ...]", "The keys among the arguments of a command."),
    ("INFO [<name> ...]", "Arity, flags and keys of these commands, or of all."),
    ("LIST [FILTERBY PATTERN <pattern>]", "The names of the commands."),
];

/// Those of CONFIG.
pub const CONFIG: &[Usage] = &[
    ("GET <pattern> [<pattern> ...]", "Settings whose names match, and their values."),
    ("RESETSTAT", "Counts the commands of INFO from zero again."),
    ("SET <name> <value> [<name> <value> ...]", "Changes settings, until the node stops."),
];

/// The answer: lines, as Redis gives them.
pub fn reply(command: &str, usages: &[Usage]) -> Response {
    let head = format!("{command} <subcommand> [<argument> ...]. Subcommands are:");
    let mut lines = vec![Response::Simple(head.into())];
    for (usage, text) in usages.iter().chain(&[("HELP", "This text.")]) {
        lines.push(Response::Simple((*usage).into()));
        lines.push(Response::Simple(format!("    {text}").into()));
    }
    Response::Array(lines)
}
