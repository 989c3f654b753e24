//! See `fuzz::header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::header(data));
