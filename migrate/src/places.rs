//! Who is connected: a full house is not one of clients who say nothing.
//!
//! Each connection has a place. When all are taken, one that is idle gives way to the next who comes: of the peer that
//! has the most places, the one that has been idle for longest. One whose request is being answered never does.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// What a connection does.
#[derive(Debug)]
struct Seat {
    peer: String,
    /// Requests under way, their answers' bodies included.
    busy: u32,
    /// Counts the changes of all: the lower, the longer it has been as it is.
    since: u64,
    leave: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Table {
    seats: BTreeMap<u64, Seat>,
    clock: u64,
}

/// The places of a server.
#[derive(Debug, Clone)]
pub struct Places {
    max: usize,
    // Shared by the connections' tasks; held for moments.
    table: Arc<Mutex<Table>>,
    freed: Arc<Notify>,
}

/// A connection's place; free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    id: u64,
    leave: Arc<Notify>,
}

/// A request under way.
#[derive(Debug)]
pub struct Busy {
    places: Places,
    id: u64,
}

impl Places {
    /// For `max` connections.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self {
            max,
            table: Arc::default(),
            freed: Arc::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place, for which an idle one may have to leave; waits when there is none.
    pub async fn enter(&self, peer: &str) -> Place {
        loop {
            let freed = self.freed.notified();
            if let Some(place) = self.try_enter(peer) {
                return place;
            }
            freed.await;
        }
    }

    /// A place, for which an idle one may have to leave; `None` when all are at work.
    #[must_use]
    pub fn try_enter(&self, peer: &str) -> Option<Place> {
        let mut table = self.table();
        if table.seats.len() >= self.max {
            let mut of_peer: HashMap<&str, usize> = HashMap::new();
            for seat in table.seats.values() {
                *of_peer.entry(&seat.peer).or_default() += 1;
            }
            let many = |seat: &Seat| of_peer.get(seat.peer.as_str()).copied().unwrap_or(0);
            let idle = table.seats.iter().filter(|(_, seat)| seat.busy == 0);
            let (id, leave) = idle
                .max_by_key(|(_, seat)| (many(seat), std::cmp::Reverse(seat.since)))
                .map(|(id, seat)| (*id, seat.leave.clone()))?;
            // Its place is another's from now on, though it takes a moment to go.
            table.seats.remove(&id);
            leave.notify_one();
        }
        table.clock += 1;
        let id = table.clock;
        let seat = Seat {
            peer: peer.to_owned(),
            busy: 0,
            since: id,
            leave: Arc::default(),
        };
        let leave = seat.leave.clone();
        table.seats.insert(id, seat);
        Some(Place {
            places: self.clone(),
            id,
            leave,
        })
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut Seat)) {
        let mut table = self.table();
        table.clock += 1;
        let now = table.clock;
        if let Some(seat) = table.seats.get_mut(&id) {
            change(seat);
            seat.since = now;
        }
        drop(table);
        self.freed.notify_waiters();
    }
}

impl Place {
    /// Marks a request as under way, until what is returned is dropped.
    #[must_use]
    pub fn busy(&self) -> Busy {
        Busy::new(self.places.clone(), self.id)
    }

    /// The same for a task that has not the place itself.
    pub fn marker(&self) -> impl Fn() -> Busy + Clone + Send + Sync + 'static + use<> {
        let (places, id) = (self.places.clone(), self.id);
        move || Busy::new(places.clone(), id)
    }

    /// Returns when the place is given to another.
    pub async fn given_away(&self) {
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
        self.places.freed.notify_waiters();
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
        let [old, busy, new] = [(); 3].map(|()| places.try_enter("here").unwrap());
        let work = busy.busy();
        let fourth = places.try_enter("here").unwrap();
        assert_eq!(
            [&old, &busy, &new, &fourth].map(asked_to_leave),
            [true, false, false, false]
        );
        let fifth = places.try_enter("here").unwrap();
        assert!(asked_to_leave(&new) && !asked_to_leave(&busy));
        let (_a, _b) = (fourth.busy(), fifth.busy());
        assert!(places.try_enter("here").is_none(), "all work");
        drop(work);
        assert!(places.try_enter("here").is_some());
        assert!(asked_to_leave(&busy));
        drop((old, new));
    }

    #[test]
    fn a_peer_with_many_gives_way_before_one_with_few() {
        let places = Places::new(4);
        let single = places.try_enter("other").unwrap();
        let many = [(); 3].map(|()| places.try_enter("flood").unwrap());
        let next = places.try_enter("flood").unwrap();
        assert!(!asked_to_leave(&single) && asked_to_leave(&many[0]));
        drop(next);
    }

    #[tokio::test]
    async fn who_waits_gets_the_place_of_the_next_that_is_idle() {
        let places = Places::new(1);
        let one = places.try_enter("here").unwrap();
        let work = one.busy();
        let waiting = tokio::spawn({
            let places = places.clone();
            async move { places.enter("here").await }
        });
        tokio::task::yield_now().await;
        drop(work);
        waiting.await.unwrap();
        one.given_away().await;
    }
}
