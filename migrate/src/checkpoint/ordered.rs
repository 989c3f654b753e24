//! Work shared between threads, its results taken in order, with a bounded number of them in memory.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What the workers and the consumer share. One mutex, held to claim an item (and prepare it) and to hand a result over:
/// that takes microseconds, an item takes hundreds of them.
struct Shared<T, P> {
    state: Mutex<State<T, P>>,
    /// There may be an item to claim.
    claimable: Condvar,
    /// There may be a result to take.
    ready: Condvar,
}

struct State<T, P> {
    /// What is prepared for an item when it is claimed: in order, whichever thread claims it.
    prepare: P,
    claimed: usize,
    taken: usize,
    results: BTreeMap<usize, T>,
    stopped: bool,
}

impl<T, P> Shared<T, P> {
    fn lock(&self) -> MutexGuard<'_, State<T, P>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stopped = true;
        self.claimable.notify_all();
        self.ready.notify_all();
    }
}

/// Stops everyone when the consumer leaves, by an error or a panic or at the end: nobody may wait for it any more.
struct StopOnDrop<'a, T, P>(&'a Shared<T, P>);

impl<T, P> Drop for StopOnDrop<'_, T, P> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Stops everyone when a worker panics: its result never comes. A worker that is done leaves the others at work.
struct StopOnPanic<'a, T, P>(&'a Shared<T, P>);

impl<T, P> Drop for StopOnPanic<'_, T, P> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// Calls `work` for `0..items` on `threads` threads, each with a state of its own from `state`, and `take` with the
/// results in order on this one. At most `window` results are claimed and not yet taken. `prepare` is called for each
/// item before `work`, in order and by one thread at a time: keep it short beside the work.
///
/// # Errors
/// The first error of `take`; items not yet claimed are then left.
pub(super) fn ordered<S, I, T: Send, E>(
    items: usize,
    threads: usize,
    window: usize,
    state: impl Fn() -> S + Sync,
    prepare: impl FnMut(usize) -> I + Send,
    work: impl Fn(&mut S, usize, I) -> T + Sync,
    mut take: impl FnMut(T) -> Result<(), E>,
) -> Result<(), E> {
    let shared = Shared {
        state: Mutex::new(State {
            prepare,
            claimed: 0,
            taken: 0,
            results: BTreeMap::new(),
            stopped: false,
        }),
        claimable: Condvar::new(),
        ready: Condvar::new(),
    };
    let window = window.max(1);
    let run = || {
        let _stop = StopOnPanic(&shared);
        let mut own = state();
        loop {
            let mut at = shared.lock();
            while !at.stopped && at.claimed < items && at.claimed >= at.taken + window {
                at = shared.claimable.wait(at).unwrap_or_else(PoisonError::into_inner);
            }
            if at.stopped || at.claimed >= items {
                break;
            }
            let item = at.claimed;
            at.claimed += 1;
            let input = (at.prepare)(item);
            drop(at);
            let result = work(&mut own, item, input);
            shared.lock().results.insert(item, result);
            shared.ready.notify_one();
        }
    };
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&shared);
        for _ in 0..threads.clamp(1, items.max(1)) {
            scope.spawn(run);
        }
        for item in 0..items {
            let mut at = shared.lock();
            let result = loop {
                if let Some(result) = at.results.remove(&item) {
                    break result;
                }
                if at.stopped {
                    // A worker panicked; leaving the scope passes the panic on.
                    return Ok(());
                }
                at = shared.ready.wait(at).unwrap_or_else(PoisonError::into_inner);
            };
            at.taken = item + 1;
            drop(at);
            shared.claimable.notify_all();
            take(result)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn in_order_and_never_more_than_the_window() {
        let (open, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let mut got = Vec::new();
        let work = |(): &mut (), item: usize, prepared: usize| {
            assert_eq!(prepared, item * 2);
            most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Uneven work, so that results come out of order.
            (0..(item % 7) * 1000).for_each(|n| _ = std::hint::black_box(n));
            item
        };
        let mut prepared = Vec::new();
        ordered(
            500,
            4,
            5,
            || (),
            |item| {
                prepared.push(item);
                item * 2
            },
            work,
            |item| {
                open.fetch_sub(1, Ordering::SeqCst);
                got.push(item);
                Ok::<_, ()>(())
            },
        )
        .unwrap();
        assert_eq!(got, (0..500).collect::<Vec<_>>());
        assert_eq!(prepared, got);
        // One more than the window: the consumer has taken it and not yet counted it down.
        assert!(
            most.load(Ordering::SeqCst) <= 6,
            "{} at a time",
            most.load(Ordering::SeqCst)
        );
    }

    #[test]
    fn an_error_stops_the_work() {
        let worked = AtomicUsize::new(0);
        let work = |(): &mut (), item, ()| {
            worked.fetch_add(1, Ordering::SeqCst);
            item
        };
        let result = ordered(
            1000,
            2,
            4,
            || (),
            |_| (),
            work,
            |item| if item < 10 { Ok(()) } else { Err(item) },
        );
        assert_eq!(result, Err(10));
        assert!(worked.load(Ordering::SeqCst) < 30);
    }

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn a_panic_of_a_worker_reaches_the_caller() {
        let work = |(): &mut (), item, ()| assert_ne!(item, 5);
        let _ = ordered(1000, 2, 4, || (), |_| (), work, |()| Ok::<_, ()>(()));
    }
}
