//! What must never depend on what: `segment <- migrate <- vmm`, and who may touch KVM or use `unsafe`.
#![allow(clippy::unwrap_used)] // A helper of a test fails the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The normal and build dependencies of a crate of the workspace; its tests may use more.
fn dependencies(metadata: &Value, name: &str) -> Vec<String> {
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages
        .iter()
        .find(|p| p["name"] == name)
        .unwrap_or_else(|| panic!("no crate {name}"));
    let all = package["dependencies"].as_array().unwrap().iter();
    all.filter(|d| d["kind"] != "dev")
        .map(|d| d["name"].as_str().unwrap().to_owned())
        .collect()
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {folder}");
    found
}

#[test]
fn crates_depend_downwards_only() {
    let metadata = metadata();
    let ours = [
        "segment",
        "migrate",
        "vmm",
        "guest-images",
        "understudy-tests",
        "understudy-sim",
    ];
    for (name, allowed) in [
        ("segment", &[][..]),
        ("migrate", &["segment"]),
        ("vmm", &["segment", "migrate"]),
        ("guest-images", &[]),
        // What decides is driven without a monitor.
        ("understudy-sim", &["segment", "migrate"]),
    ] {
        for dependency in dependencies(&metadata, name) {
            let fine = !ours.contains(&dependency.as_str()) || allowed.contains(&dependency.as_str());
            assert!(fine, "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn the_format_has_no_clock_thread_socket_or_runtime() {
    for dependency in dependencies(&metadata(), "segment") {
        let allowed = ["blake3", "minicbor", "ring", "thiserror", "zeroize", "zstd"];
        assert!(
            allowed.contains(&dependency.as_str()),
            "segment must not depend on {dependency}"
        );
    }
    for (path, text) in sources("migrate/segment/src") {
        for word in [
            "std::time",
            "std::thread",
            "std::net",
            "SystemTime",
            "Instant::now",
            "rand::",
        ] {
            assert!(!text.contains(word), "{} uses {word}", path.display());
        }
    }
}

#[test]
fn only_the_monitor_knows_kvm_and_few_places_are_unsafe() {
    for name in ["segment", "migrate"] {
        for dependency in dependencies(&metadata(), name) {
            assert!(
                !dependency.starts_with("kvm") && dependency != "vm-memory",
                "{name} must not know {dependency}"
            );
        }
    }
    for folder in ["migrate/src", "migrate/segment/src"] {
        let (_, lib) = sources(folder)
            .into_iter()
            .find(|(path, _)| path.ends_with("src/lib.rs"))
            .unwrap();
        assert!(
            lib.contains("#![forbid(unsafe_code)]"),
            "{folder}/lib.rs must forbid unsafe code"
        );
    }
    for (path, text) in sources("migrate/src") {
        let opens = text
            .lines()
            .any(|line| !line.trim_start().starts_with("//") && line.contains("/dev/kvm"));
        assert!(!opens, "{} must not know /dev/kvm", path.display());
    }
    let may = ["memory.rs", "kvm.rs", "vcpu.rs", "tap.rs"];
    for (path, text) in sources("vmm/src") {
        let file = path.file_name().unwrap().to_str().unwrap();
        let uses = text
            .lines()
            .map(str::trim_start)
            // A block, a function, an implementation; `unsafe_code` is the lint's name.
            .any(|line| !line.starts_with("//") && line.contains("unsafe "));
        assert!(
            !uses || may.contains(&file),
            "{} must not use unsafe",
            path.display()
        );
    }
}

#[test]
fn inside_the_monitor_few_places_know_the_layers_below() {
    for (path, text) in sources("vmm/src") {
        let inside = path
            .strip_prefix(root().join("vmm/src"))
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let code = |word: &str| {
            text.lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(word))
        };
        let top = inside.split('/').next().unwrap().trim_end_matches(".rs");
        // Under another name nothing below would see it.
        assert!(
            !code("migrate as ") && !code("segment as "),
            "{inside} renames a layer below"
        );
        if code("migrate::") {
            assert!(
                ["replica", "session", "api", "cli", "bin"].contains(&top),
                "{inside} names migrate"
            );
        }
        if code("segment::") {
            let may = ["state", "replica", "session", "config", "api", "cli", "bin"];
            assert!(may.contains(&top), "{inside} names segment");
        }
    }
}

#[test]
fn every_rename_and_sync_of_the_store_is_in_one_file() {
    for (path, text) in sources("migrate/src") {
        if path.ends_with("crashsafe.rs")
            || path
                .file_name()
                .is_some_and(|f| f.to_str().unwrap().contains("test"))
        {
            continue;
        }
        // Where the tests are in the file itself they are its end.
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let code: String = code
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            // A switch of the crate that writes the global store.
            .map(|line| line.replace("with_fsync(", "") + "\n")
            .collect();
        for word in [
            "rename(",
            "rename as",
            "renameat",
            "sync_all",
            "sync_data",
            "fsync(",
        ] {
            assert!(
                !code.contains(word),
                "{} uses {word}: that belongs into crashsafe.rs",
                path.display()
            );
        }
    }
}
