//! Debian's kernel and tools as parts of machine images. Nothing is installed on the building machine.

mod image;
mod kernel;
mod packages;
mod root;

use std::io as std_io;
use std::path::{Path, PathBuf};

pub use image::Image;
pub use kernel::{Kernel, Module};
pub use packages::{Package, Packages};
pub use root::root_disk;

/// What went wrong while an image was made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// apt knows no such package, even after an update.
    #[error("apt has no package {name}: is Debian's archive in its sources?")]
    NoPackage {
        /// The package.
        name: String,
    },
    /// A kernel package without that module.
    #[error("the kernel has no module {name}")]
    NoModule {
        /// The module.
        name: String,
    },
    /// A kernel package, or the image in it, of an unknown shape.
    #[error("not a kernel that can be used here: {what}")]
    NotAKernel {
        /// What is wrong with it.
        what: String,
    },
    /// A package without a file that should be in it.
    #[error("package {package} has no {file}")]
    NoFile {
        /// The package.
        package: String,
        /// The file, as it would be under `/`.
        file: String,
    },
    /// A program that is needed could not be started.
    #[error("cannot start {program}: install the package that has it")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std_io::Error,
    },
    /// A program failed.
    #[error("{command} ended with {status}: {said}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: String,
        /// Its standard error.
        said: String,
    },
    /// The file system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std_io::Error,
    },
}

pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std_io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { action, path, source }
}

/// A folder for what is made once and used again: below the target folder that the running program was built in.
#[must_use]
pub fn cache() -> Option<PathBuf> {
    let me = std::env::current_exe().ok()?;
    let target = me
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").is_file())?;
    Some(target.join("nested-host"))
}
