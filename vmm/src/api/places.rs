//! Who is connected: a full house is not one of clients who say nothing.
//!
//! Each connection has a place. When all are taken, the one that has been idle for longest gives way to the next who
//! comes, but none before it had a moment to send its request. One whose request is being answered never does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// How long a connection may be idle before another may have its place.
const GRACE: Duration = Duration::from_millis(500);

/// What a connection does.
#[derive(Debug)]
struct Seat {
    /// Requests under way, their answers' bodies included.
    busy: u32,
    /// When that changed last.
    since: Instant,
    leave: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Table {
    seats: BTreeMap<u64, Seat>,
    next: u64,
}

/// The places of a server.
#[derive(Debug, Clone)]
pub(super) struct Places {
    max: usize,
    // Shared by the connections' tasks; held for moments.
    table: Arc<Mutex<Table>>,
    changed: Arc<Notify>,
}

/// A connection's place; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Places,
    id: u64,
    leave: Arc<Notify>,
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Busy {
    places: Places,
    id: u64,
}

impl Places {
    /// For `max` connections.
    pub(super) fn new(max: usize) -> Self {
        Self {
            max,
            table: Arc::default(),
            changed: Arc::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, for which an idle one may have to leave; waits when there is none.
    pub(super) async fn enter(&self) -> Place {
        loop {
            let changed = self.changed.notified();
            let again = match self.try_enter(Instant::now()) {
                Ok(place) => return place,
                Err(again) => again,
            };
            match again {
                // Whether it ran out or something changed, it is looked at again.
                Some(at) => drop(tokio::time::timeout_at(at, changed).await),
                None => changed.await,
            }
        }
    }

    /// A place; or when one will have been idle for long enough, if any is idle.
    fn try_enter(&self, now: Instant) -> Result<Place, Option<Instant>> {
        let mut table = self.table();
        if table.seats.len() >= self.max {
            let idle = table.seats.iter().filter(|(_, seat)| seat.busy == 0);
            let oldest = idle.min_by_key(|(_, seat)| seat.since);
            let (id, free_at, leave) = oldest
                .map(|(id, seat)| (*id, seat.since + GRACE, seat.leave.clone()))
                .ok_or(None)?;
            if free_at > now {
                return Err(Some(free_at));
            }
            // Its place is another's from now on, though it takes a moment to go.
            table.seats.remove(&id);
            leave.notify_one();
        }
        table.next += 1;
        let id = table.next;
        let seat = Seat {
            busy: 0,
            since: now,
            leave: Arc::default(),
        };
        let leave = seat.leave.clone();
        table.seats.insert(id, seat);
        Ok(Place {
            places: self.clone(),
            id,
            leave,
        })
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Seat)) {
        if let Some(seat) = self.table().seats.get_mut(&id) {
            change(seat);
            seat.since = Instant::now();
        }
        self.changed.notify_waiters();
    }
}

impl Place {
    /// Marks a request as under way, until what the function returns is dropped.
    pub(super) fn marker(&self) -> impl Fn() -> Busy + Clone + Send + Sync + 'static + use<> {
        let (places, id) = (self.places.clone(), self.id);
        move || Busy::new(places.clone(), id)
    }

    /// Returns when the place is given to another.
    pub(super) async fn given_away(&self) {
        self.leave.notified().await;
    }
}

impl Busy {
    fn new(places: Places, id: u64) -> Self {
        places.change(id, |seat| seat.busy += 1);
        Self { places, id }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.places
            .change(self.id, |seat| seat.busy = seat.busy.saturating_sub(1));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.table().seats.remove(&self.id);
        self.places.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked_to_leave(place: &Place) -> bool {
        use std::task::{Context, Poll, Waker};
        let asked = std::pin::pin!(place.given_away());
        asked.poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
    }

    #[test]
    fn who_says_nothing_gives_way_and_who_works_does_not() {
        let places = Places::new(3);
        let start = Instant::now();
        let came = |ms| start + Duration::from_millis(ms);
        let three = [0, 1, 2].map(|ms| places.try_enter(came(ms)).unwrap());
        let work = three[1].marker()();
        let told = places.try_enter(came(3)).unwrap_err();
        assert_eq!(told, Some(start + GRACE), "all have just come");
        let late = start + GRACE * 3;
        let fourth = places.try_enter(late).unwrap();
        assert!(asked_to_leave(&three[0]) && !asked_to_leave(&three[1]) && !asked_to_leave(&three[2]));
        let fifth = places.try_enter(late).unwrap();
        assert!(asked_to_leave(&three[2]) && !asked_to_leave(&three[1]));
        let (_a, _b) = (fourth.marker()(), fifth.marker()());
        let later = Instant::now() + GRACE * 9;
        assert_eq!(places.try_enter(later).unwrap_err(), None, "all work");
        drop(work);
        assert!(places.try_enter(Instant::now() + GRACE * 9).is_ok());
        assert!(asked_to_leave(&three[1]));
    }

    #[tokio::test]
    async fn who_waits_gets_the_place_of_the_next_that_is_idle() {
        let places = Places::new(1);
        let one = places.try_enter(Instant::now()).unwrap();
        let work = one.marker()();
        let waiting = tokio::spawn({
            let places = places.clone();
            async move { places.enter().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(work);
        waiting.await.unwrap();
        one.given_away().await;
    }
}
