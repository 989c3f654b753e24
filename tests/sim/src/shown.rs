//! A value of the product that can be neither hashed nor compared, for a checker that needs both.

use std::fmt::{self, Debug, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// Told apart by what it shows: two that are shown alike are alike.
#[derive(Clone)]
pub struct Shown<T> {
    of: Arc<T>,
    digest: u64,
}

/// Hashes what is written to it.
struct Hashing(DefaultHasher);

impl Write for Hashing {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

impl<T: Debug> Shown<T> {
    /// Of this value.
    pub fn new(of: T) -> Self {
        let digest = digest(&of);
        Self {
            of: Arc::new(of),
            digest,
        }
    }
}

impl<T: Debug + Clone> Shown<T> {
    /// Changes it.
    pub fn change<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(Arc::make_mut(&mut self.of));
        self.digest = digest(&*self.of);
        result
    }
}

fn digest(of: &impl Debug) -> u64 {
    // Always the same keys: the states of two runs are the same ones.
    let mut hashing = Hashing(DefaultHasher::new());
    // Writing to it cannot fail.
    let _ = write!(hashing, "{of:?}");
    hashing.0.finish()
}

impl<T> Deref for Shown<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.of
    }
}

impl<T> Hash for Shown<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl<T> PartialEq for Shown<T> {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl<T> Eq for Shown<T> {}

impl<T: Debug> Debug for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.of.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::Shown;

    #[test]
    fn it_is_told_apart_by_what_it_shows() {
        let mut one = Shown::new(vec![1, 2]);
        let other = one.clone();
        assert_eq!(one, other);
        one.change(|list| list.push(3));
        assert_ne!(one, other);
        assert_eq!(one, Shown::new(vec![1, 2, 3]));
    }
}
