//! Files that are kernels and files that are not; what is written for those that are.

use super::*;
use crate::layout::{HIGH_MEMORY, HIGH_RAM_START, PAGE_TABLES, ZERO_PAGE};
use std::io::Write;

/// A bzImage of one setup sector and `body`, as far as a loader looks at it.
fn bzimage(change: impl Fn(&mut [u8])) -> tempfile::NamedTempFile {
    let mut image = vec![0; 1024 + 4096];
    image[0x1f1] = 1; // setup_sects
    image[0x202..0x206].copy_from_slice(BZIMAGE_MAGIC);
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1; // loadflags
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&1u16.to_le_bytes()); // xloadflags
    image[0x238..0x23c].copy_from_slice(&64u32.to_le_bytes()); // cmdline_size
    image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes()); // pref_address
    image[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes()); // init_size
    image[1024..1028].copy_from_slice(b"code");
    change(&mut image);
    file(&image)
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn start(mib: u64, kernel: &Path, initrd: Option<&Path>, line: &str) -> Result<(GuestRam, Entry), BootError> {
    let ram = GuestRam::new(mib << 20).unwrap();
    let source = BootSource {
        kernel: kernel.to_owned(),
        initrd: initrd.map(Path::to_owned),
        command_line: line.into(),
    };
    let entry = load(&ram, &source, 2, &[])?;
    Ok((ram, entry))
}

#[test]
fn a_bzimage_finds_its_map_initrd_and_command_line() {
    let (kernel, initrd) = (bzimage(|_| ()), file(&[7; 5000]));
    let (ram, entry) = start(5 << 10, kernel.path(), Some(initrd.path()), "quiet").unwrap();
    assert_eq!(entry, Entry::Linux(HIGH_MEMORY + 0x200));
    let read = |at: u64, bytes: usize| {
        let mut out = vec![0; bytes];
        ram.memory().read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    };
    let u64_at = |at: u64| u64::from_le_bytes(read(at, 8).try_into().unwrap());
    let u32_at = |at: u64| u32::from_le_bytes(read(at, 4).try_into().unwrap());
    assert_eq!(read(HIGH_MEMORY, 4), b"code");
    assert_eq!(read(u32_at(ZERO_PAGE + 0x228).into(), 6), b"quiet\0");
    let (image, size) = (u32_at(ZERO_PAGE + 0x218), u32_at(ZERO_PAGE + 0x21c));
    assert_eq!((u64::from(image), size), (LOW_RAM_END - 8192, 5000));
    assert_eq!(read(image.into(), 5000), vec![7; 5000]);
    // e820: four entries of 20 bytes, the last of them the 2 GiB above the hole.
    assert_eq!(read(ZERO_PAGE + 0x1e8, 1), [4]);
    let last = ZERO_PAGE + 0x2d0 + 3 * 20;
    assert_eq!(
        (u64_at(last), u64_at(last + 8), u32_at(last + 16)),
        (HIGH_RAM_START, 2 << 30, 1)
    );
    assert_eq!(read(u64_at(ZERO_PAGE + 0x70), 8), b"RSD PTR ");
    // The page tables map an address near 4 GiB to itself.
    let address = 0xfee0_0000u64;
    let directory = u64_at((u64_at(PAGE_TABLES) & !0xfff) + 8 * (address >> 30)) & !0xfff;
    assert_eq!(
        u64_at(directory + 8 * ((address >> 21) & 511)) & !0xfff,
        address & !0x1f_ffff
    );
}

#[test]
fn a_kernel_that_cannot_be_started_is_refused_with_the_reason() {
    let refused = |kernel: tempfile::NamedTempFile, mib, line: &str| {
        start(mib, kernel.path(), None, line).unwrap_err().to_string()
    };
    let old = bzimage(|image| image[0x206] = 9);
    assert!(refused(old, 64, "").contains("2.09"));
    assert!(refused(bzimage(|image| image[0x236] = 0), 64, "").contains("no 64-bit entry"));
    assert!(
        refused(bzimage(|_| ()), 16, "").contains("too little"),
        "it unpacks to 16..18 MiB"
    );
    assert!(refused(bzimage(|image| image[0x25f] = 0xff), 64, "").contains("too little"));
    let long = "x".repeat(65);
    assert!(refused(bzimage(|_| ()), 64, &long).contains("at most 64"));
    assert!(refused(bzimage(|image| image[0x1f1] = 200), 64, "").contains("not a kernel"));
    assert!(refused(file(b"MZ"), 64, "").contains("ends inside"));
    assert!(refused(file(&[b'#'; 4096]), 64, "").contains("no ELF header"));
    assert!(
        start(64, Path::new("/"), None, "")
            .unwrap_err()
            .to_string()
            .contains("regular file")
    );
}
