//! Tests of the segment format, through its public face alone.

mod common;
mod damage;
mod encrypted;
mod forge;
mod forms;
mod golden;
mod hostile_frame;
mod hostile_header;
mod hostile_index;
mod hostile_manifest;
mod hostile_records;
mod merge;
mod round_trip;
mod writer;
