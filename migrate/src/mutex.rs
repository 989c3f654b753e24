//! Locks that outlive a panic: what they guard is changed in steps that are each whole.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The guard of `mutex`, also after a thread that held it panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
