//! What stands on what, for all segments of one VM at once: pure, and linear in their number.

use std::collections::HashMap;

use segment::{Epoch, Generation};

use super::Entry;
use super::keep::Point;

/// The segments of one VM, oldest position first, and how they stand on each other.
#[derive(Debug)]
pub struct Lineage {
    entries: Vec<Entry>,
    /// Where the parent is, when it is there and the right checkpoint.
    parents: Vec<Option<usize>>,
    /// Links of the whole chain, the segment itself included; 0 when something is missing below.
    links: Vec<u32>,
}

impl Lineage {
    /// Of `entries`, which are all of one VM and have each their own name.
    #[must_use]
    pub fn new(mut entries: Vec<Entry>) -> Self {
        entries.sort_by_key(|entry| entry.name.position());
        let at: HashMap<(Generation, Epoch), usize> = entries
            .iter()
            .enumerate()
            .map(|(i, entry)| (entry.name.position(), i))
            .collect();
        let (mut parents, mut links) = (
            Vec::with_capacity(entries.len()),
            Vec::with_capacity(entries.len()),
        );
        for (i, entry) in entries.iter().enumerate() {
            let (parent, count) = match entry.parent() {
                None => (None, 1),
                Some((name, checkpoint)) => {
                    // A parent is always earlier, so its own links are counted already. A manifest that says otherwise
                    // was refused when it was read; here it counts as incomplete.
                    let parent = at.get(&name.position()).copied().filter(|p| {
                        *p < i && entries[*p].checkpoint == checkpoint && entries[*p].name == *name
                    });
                    let below = parent.map_or(0, |p: usize| links[p]);
                    (parent, if below == 0 { 0 } else { below + 1 })
                }
            };
            parents.push(parent);
            links.push(count);
        }
        Self {
            entries,
            parents,
            links,
        }
    }

    /// The segments, oldest position first.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Where the parent of segment `i` is.
    #[must_use]
    pub fn parent(&self, i: usize) -> Option<usize> {
        self.parents[i]
    }

    /// Links of the chain of segment `i`, itself included; 0 when it is not whole.
    #[must_use]
    pub fn links(&self, i: usize) -> u32 {
        self.links[i]
    }

    /// The newest segment whose chain is whole.
    #[must_use]
    pub fn newest_complete(&self) -> Option<usize> {
        self.links.iter().rposition(|links| *links > 0)
    }

    /// The segments that can be restored, oldest first.
    #[must_use]
    pub fn points(&self) -> Vec<Point> {
        let whole = self
            .entries
            .iter()
            .zip(&self.links)
            .filter(|(_, links)| **links > 0);
        whole.map(|(entry, _)| Point::from(entry)).collect()
    }
}

impl From<&Entry> for Point {
    fn from(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            created_unix_ns: entry.created_unix_ns,
            label: entry.label.clone(),
        }
    }
}
