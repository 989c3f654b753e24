//! Hears all consoles of a VM: one thread, one pipe for each generation on each host.
//!
//! ```text
//!   the agent --> wrapper (sh) --mkfifo--> FOLDER/GENERATION.HOST --exec--> vmm .. --console-log FOLDER/GENERATION.HOST
//!                                                   |
//!   poll: all pipes, the lowest generation first ---+--> Witness
//! ```
//!
//! Why what the witness is given is in the order of writing, as far as that matters: a pipe keeps its order. Of two pipes,
//! what is read from the higher generation's was written before it was read; when it is the first of that generation, all
//! lower ones are emptied once more before the witness gets it. What then still comes from a lower one was written after
//! that, and so after the first word of the higher one: it is an overlap, and no accident of the reading. The other way round
//! a word is missed that was written between the higher one's first and that moment; for how long that can be is measured
//! ([`Hearing::blind`]), as is how long there was silence before a takeover's first word ([`Hearing::silence`]). Where the
//! silence is longer there was nothing to miss.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

use super::witness::{Speaker, Witness};

/// For how long it waits for a word before it looks for new consoles. A VM waits for that to open its own.
const TURN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};

/// What was heard, and the first thing that may not be.
#[derive(Debug, Default)]
pub(super) struct Hearing {
    pub(super) witness: Witness,
    pub(super) refused: Option<anyhow::Error>,
    /// When the highest generation was heard first.
    pub(super) rose: Option<Instant>,
    /// When anything was heard last.
    last: Option<Instant>,
    /// For how long at most, at a takeover, a word of the owner before would have been taken for one said in time.
    pub(super) blind: Duration,
    /// The shortest silence before the first word of a takeover.
    pub(super) silence: Option<Duration>,
}

impl Hearing {
    /// Keeps the first refusal.
    pub(super) fn note(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.refused.get_or_insert(error);
        }
    }
}

/// The thread that hears; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Ears {
    // The listening thread, the one that reads statuses and the story each look for moments.
    hearing: Arc<Mutex<Hearing>>,
    folder: PathBuf,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Channel {
    speaker: Speaker,
    path: PathBuf,
    pipe: File,
    over: bool,
}

fn lock(hearing: &Mutex<Hearing>) -> MutexGuard<'_, Hearing> {
    hearing.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ears {
    /// Listens to all consoles that appear in `folder`, which is made. What is heard is also kept in `folder`.log, a file
    /// for each.
    pub(super) fn start(folder: &Path) -> Result<Self> {
        let kept = folder.with_extension("log");
        for folder in [folder, &kept] {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        let (hearing, end) = (Arc::new(Mutex::default()), Arc::new(AtomicBool::new(false)));
        let mut listener = Listener {
            folder: folder.to_owned(),
            kept,
            hearing: Arc::clone(&hearing),
            channels: Vec::new(),
            waited: Instant::now(),
        };
        let over = Arc::clone(&end);
        let thread = std::thread::Builder::new()
            .name("ears".into())
            .spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    if let Err(error) = listener.turn() {
                        let error = error.context("the witness itself failed");
                        lock(&listener.hearing).note(Err(error));
                        return;
                    }
                }
            })
            .context("start the witness")?;
        Ok(Self {
            hearing,
            folder: folder.to_owned(),
            end,
            thread: Some(thread),
        })
    }

    /// What was heard.
    pub(super) fn hearing(&self) -> MutexGuard<'_, Hearing> {
        lock(&self.hearing)
    }

    /// The same for other threads.
    pub(super) fn share(&self) -> Arc<Mutex<Hearing>> {
        Arc::clone(&self.hearing)
    }

    /// Where a generation on a host writes its console to.
    pub(super) fn console(&self, generation: u64, host: &str) -> PathBuf {
        self.folder.join(format!("{generation}.{host}"))
    }

    /// Makes a program for the agent of `host` that starts `vmm` with a console that is heard.
    pub(super) fn wrapper(&self, host: &str, vmm: &Path) -> Result<PathBuf> {
        let path = self.folder.with_extension(format!("vmm-{host}"));
        // Only a VM that is taken over has a generation. The arguments go round once, the console's exchanged.
        let script = format!(
            "#!/bin/sh\n\
             generation= before=\n\
             for word; do\n\
             \x20 [ \"$before\" = --generation ] && generation=$word\n\
             \x20 before=$word\n\
             done\n\
             [ -n \"$generation\" ] || exec '{vmm}' \"$@\"\n\
             console='{folder}'/$generation.{host}\n\
             mkfifo -m 600 \"$console\"\n\
             left=$#\n\
             while [ $left -gt 0 ]; do\n\
             \x20 word=$1; shift; left=$((left - 1))\n\
             \x20 if [ \"$word\" = --console-log ]; then\n\
             \x20   set -- \"$@\" --console-log \"$console\"; shift; left=$((left - 1))\n\
             \x20 else\n\
             \x20   set -- \"$@\" \"$word\"\n\
             \x20 fi\n\
             done\n\
             exec '{vmm}' \"$@\"\n",
            vmm = vmm.display(),
            folder = self.folder.display()
        );
        fs::write(&path, script).with_context(|| format!("write {}", path.display()))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&path, mode)?;
        Ok(path)
    }

    /// The first thing that was heard and may not be.
    pub(super) fn check(&self) -> Result<()> {
        match self.hearing().refused.take() {
            Some(refused) => Err(refused),
            None => Ok(()),
        }
    }
}

impl Drop for Ears {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

struct Listener {
    folder: PathBuf,
    kept: PathBuf,
    hearing: Arc<Mutex<Hearing>>,
    /// Of all consoles that are open, the lowest generation first.
    channels: Vec<Channel>,
    /// When it was waited for a word last: what had none then was silent until then at least.
    waited: Instant,
}

impl Listener {
    /// Waits for a word, and hears all there is.
    fn turn(&mut self) -> Result<()> {
        self.look_for_new()?;
        let before = std::mem::replace(&mut self.waited, Instant::now());
        let mut polled: Vec<_> = self
            .channels
            .iter()
            .map(|channel| PollFd::new(&channel.pipe, PollFlags::IN))
            .collect();
        poll(&mut polled, Some(&TURN)).context("wait for a word")?;
        let said: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        drop(polled);
        for (at, said) in said.iter().enumerate().filter(|(_, said)| !said.is_empty()) {
            self.hear(at, before)?;
            // Who wrote it has closed it. (One that nobody has opened yet has nothing to say either.)
            self.channels[at].over = said.contains(PollFlags::HUP);
        }
        self.channels.retain(|channel| {
            if channel.over {
                // Gone already is fine.
                let _ = fs::remove_file(&channel.path);
            }
            !channel.over
        });
        Ok(())
    }

    fn look_for_new(&mut self) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if self.channels.iter().any(|channel| channel.path == path) {
                continue;
            }
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            let parts = name
                .split_once('.')
                .and_then(|(g, host)| Some((g.parse().ok()?, host)));
            let (generation, host) = parts.ok_or_else(|| anyhow!("{name} is no console"))?;
            // Does not wait for who writes.
            let pipe = OpenOptions::new()
                .read(true)
                .custom_flags(OFlags::NONBLOCK.bits() as i32)
                .open(&path)?;
            self.channels.push(Channel {
                speaker: Speaker {
                    generation,
                    host: host.to_owned(),
                },
                path,
                pipe,
                over: false,
            });
        }
        self.channels.sort_by(|a, b| a.speaker.cmp(&b.speaker));
        Ok(())
    }

    /// Hears all that one console has; all lower ones before it, when it is the first word of its generation. They came
    /// after `since`.
    fn hear(&mut self, at: usize, since: Instant) -> Result<()> {
        let words = self.read(at)?;
        let rises = !words.is_empty() && lock(&self.hearing).witness.rises(&self.channels[at].speaker);
        if rises {
            for lower in 0..at {
                let last = self.read(lower)?;
                self.tell(lower, &last);
            }
        }
        let emptied = Instant::now();
        if rises {
            let mut hearing = lock(&self.hearing);
            if let (Some(last), true) = (hearing.last, hearing.witness.highest().is_some()) {
                let silence = emptied.duration_since(last);
                hearing.blind = hearing.blind.max(emptied.duration_since(since));
                hearing.silence = Some(hearing.silence.map_or(silence, |shortest| shortest.min(silence)));
            }
            hearing.rose = Some(emptied);
        }
        self.tell(at, &words);
        Ok(())
    }

    fn tell(&self, at: usize, words: &[u8]) {
        if words.is_empty() {
            return;
        }
        let mut hearing = lock(&self.hearing);
        hearing.last = Some(Instant::now());
        let heard = hearing.witness.heard(&self.channels[at].speaker, words);
        hearing.note(heard);
    }

    fn read(&mut self, at: usize) -> Result<Vec<u8>> {
        let channel = &mut self.channels[at];
        let (mut words, mut some) = (Vec::new(), [0; 4096]);
        loop {
            match channel.pipe.read(&mut some) {
                Ok(0) => break,
                Ok(n) => words.extend(&some[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("read a console"),
            }
        }
        if !words.is_empty() {
            let name = channel.path.file_name().unwrap_or_default();
            let mut kept = OpenOptions::new()
                .create(true)
                .append(true)
                .open(self.kept.join(name))?;
            std::io::Write::write_all(&mut kept, &words)?;
        }
        Ok(words)
    }
}
