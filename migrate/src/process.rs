//! Who an owner's process is, and what becomes of it, as seen from its own host.
//!
//! A process number alone means nothing: it is used again, on other hosts and in other namespaces too. With the host's
//! boot, the namespace and the time of its start it is one process for ever.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::detect::Process;
use crate::registry::OwnerProcess;

/// This process.
///
/// # Errors
/// When /proc does not say.
pub fn this() -> io::Result<OwnerProcess> {
    let pid = std::process::id();
    let Stat { started, .. } = stat(pid)?;
    Ok(OwnerProcess {
        boot: boot()?,
        namespace: namespace()?,
        pid,
        started,
    })
}

/// What became of a process; `None` when it is none of this host's, or it cannot be told.
#[must_use]
pub fn look(process: &OwnerProcess) -> Option<Process> {
    if boot().ok()? != process.boot || namespace().ok()? != process.namespace {
        return None;
    }
    match stat(process.pid) {
        Ok(stat) if stat.started != process.started => Some(Process::Gone),
        // Of a process of several threads the first may be a zombie while others run on.
        Ok(
            Stat {
                state: 'Z',
                threads: 0 | 1,
                ..
            }
            | Stat { state: 'X', .. },
        ) => Some(Process::Gone),
        Ok(Stat { state: 'T' | 't', .. }) => Some(Process::Stopped),
        Ok(Stat { state: 'D', .. }) => Some(Process::DiskHung),
        Ok(_) => Some(Process::Alive),
        // ESRCH: it ended between the opening and the reading.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(3) => Some(Process::Gone),
        Err(_) => None,
    }
}

/// The host's boot.
fn boot() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&digits, 16)
        .map(u128::to_be_bytes)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

fn namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/self/ns/pid")?.ino())
}

/// Of `/proc/PID/stat`.
struct Stat {
    state: char,
    threads: u64,
    started: u64,
}

fn stat(pid: u32) -> io::Result<Stat> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat"))?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no line of /proc/PID/stat"))
}

/// Fields 3, 20 and 22 of proc_pid_stat(5), counted behind the name, which may have anything in it.
fn parse(line: &str) -> Option<Stat> {
    let (_, rest) = line.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        threads: fields.get(17)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_one_that_ended_is_gone() {
        let me = this().unwrap();
        assert_eq!(look(&me), Some(Process::Alive));
        let reused = OwnerProcess {
            started: me.started + 1,
            ..me
        };
        assert_eq!(look(&reused), Some(Process::Gone), "the number is another's now");
        let elsewhere = OwnerProcess { boot: [0; 16], ..me };
        assert_eq!(look(&elsewhere), None);
        let hidden = OwnerProcess { namespace: 0, ..me };
        assert_eq!(look(&hidden), None);
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let Stat { started, .. } = stat(child.id()).unwrap();
        let of = OwnerProcess {
            pid: child.id(),
            started,
            ..me
        };
        assert!(matches!(look(&of), Some(Process::Alive | Process::DiskHung)));
        child.kill().unwrap();
        // Not waited for yet, it is a zombie; then it is not there at all.
        while look(&of) != Some(Process::Gone) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert_eq!(look(&of), Some(Process::Gone));
    }

    #[test]
    fn a_name_may_look_like_fields() {
        let line = "7 (a) S 1 (b) R 2) T 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 4 18 999 0";
        let Stat {
            state,
            threads,
            started,
        } = parse(line).unwrap();
        assert_eq!((state, threads, started), ('T', 4, 999));
        assert!(parse("7 (a) S 1").is_none());
    }
}
