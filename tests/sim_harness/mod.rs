//! What simulation tests share: each harness is one test file's, and the zoo's of planted mistakes.

#![allow(dead_code, reason = "each test file uses another part of this module")]

pub mod damage;
pub mod dump;
pub mod exhaustive;
pub mod faults;
pub mod starts;
