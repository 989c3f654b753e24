//! The log: `tracing` to standard error, or to where `PUT /logger` says.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::api::instance::LogControl;
use crate::config::LoggerConfig;

/// The variables that say what is logged, the first before the second.
const VARIABLES: [&str; 2] = ["UNDERSTUDY_LOG", "RUST_LOG"];

/// The log of this process, to be changed while it runs.
#[derive(Debug, Clone)]
pub(super) struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    sink: Sink,
}

/// Where lines go. Several threads log, and a request may change the place; held for one line.
#[derive(Debug, Clone, Default)]
struct Sink(Arc<Mutex<Option<File>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(file) => file.write(bytes),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Starts to log, from `default` on unless a variable says otherwise.
    ///
    /// # Errors
    /// In words, when a variable makes no sense.
    pub(super) fn start(default: &str) -> Result<Self, String> {
        let filter = match VARIABLES
            .iter()
            .find_map(|name| Some((name, std::env::var(name).ok()?)))
        {
            Some((name, text)) if !text.is_empty() => EnvFilter::try_new(&text)
                .map_err(|error| format!("{name}={text:?} is no log filter: {error}"))?,
            Some(_) | None => EnvFilter::new(default),
        };
        let (filter, handle) = reload::Layer::new(filter);
        let sink = Sink::default();
        let to = sink.clone();
        let lines = fmt::layer().with_writer(move || to.clone()).with_ansi(false);
        // A subscriber that is there already (a test's) stays.
        let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
        Ok(Self { filter: handle, sink })
    }

    fn apply(&self, config: &LoggerConfig) -> Result<(), String> {
        let level = config.tracing_level().map_err(|error| error.to_string())?;
        if let Some(path) = &config.log_path {
            let file = open(path).map_err(|error| format!("logger.log_path: open {path:?}: {error}"))?;
            *self.sink.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        }
        if level.is_some() || config.module.is_some() {
            let level = level.unwrap_or("info");
            let directives = config
                .module
                .as_ref()
                .map_or(level.to_owned(), |module| format!("{module}={level}"));
            let filter =
                EnvFilter::try_new(&directives).map_err(|error| format!("logger.module: {error}"))?;
            self.filter
                .reload(filter)
                .map_err(|error| format!("change the log: {error}"))?;
        }
        Ok(())
    }

    /// For `PUT /logger`.
    pub(super) fn control(&self) -> LogControl {
        let log = self.clone();
        Box::new(move |config| log.apply(config))
    }
}

/// A file to add to, private and without waiting for the reader of a pipe.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}
