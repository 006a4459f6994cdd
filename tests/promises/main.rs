//! What the program promises, a module a promise.

mod any_input;
mod bad_input;
mod broken_servers;
mod ci;
mod container;
mod dns;
mod failover;
mod goodbye;
mod man_in_the_middle;
mod page_commands;
mod page_diagram;
mod page_links;
mod page_tables;
mod post_quantum;
mod roots;
mod round_trips;
mod service;
mod service_taken;
mod settings;
mod soak;
mod stand_in;
mod support;
mod taken;
mod tls;
