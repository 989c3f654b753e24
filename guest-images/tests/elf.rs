//! The images as bytes: what any loader relies on.

use guest_images::ALL;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const SHT_RELA: u32 = 4;
const SHT_REL: u32 = 9;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const MAX_IMAGE_BYTES: usize = 256 << 10;
const LOAD_ADDRESS: u64 = 2 << 20;

struct Elf<'a>(&'a [u8]);

impl Elf<'_> {
    fn field<const N: usize>(&self, at: u64) -> [u8; N] {
        let at = usize::try_from(at).expect("a file offset");
        self.0[at..at + N].try_into().expect("the slice has N bytes")
    }

    fn u16(&self, at: u64) -> u64 {
        u16::from_le_bytes(self.field(at)).into()
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.field(at))
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.field(at))
    }

    /// File offsets of the program headers.
    fn programs(&self) -> Vec<u64> {
        (0..self.u16(56))
            .map(|index| self.u64(32) + index * self.u16(54))
            .collect()
    }

    /// File offsets of the section headers.
    fn sections(&self) -> Vec<u64> {
        (0..self.u16(60))
            .map(|index| self.u64(40) + index * self.u16(58))
            .collect()
    }
}

#[test]
fn the_images_are_small_static_elf64_without_relocations() {
    for (name, image) in ALL {
        let elf = Elf(image);
        assert_eq!(
            &image[..6],
            b"\x7fELF\x02\x01",
            "{name} is not a little-endian ELF64"
        );
        assert_eq!(elf.u16(16), 2, "{name} is not ET_EXEC");
        assert_eq!(elf.u16(18), 62, "{name} is not for x86-64");
        assert!(image.len() < MAX_IMAGE_BYTES, "{name} has {} bytes", image.len());
        for program in elf.programs() {
            let kind = elf.u32(program);
            assert!(kind != PT_DYNAMIC && kind != PT_INTERP, "{name} is not static");
        }
        for section in elf.sections() {
            let kind = elf.u32(section + 4);
            assert!(kind != SHT_RELA && kind != SHT_REL, "{name} has relocations");
        }
    }
}

#[test]
fn the_pvh_note_names_an_entry_inside_a_loaded_executable_segment() {
    for (name, image) in ALL {
        let elf = Elf(image);
        let of_kind = |kind| {
            elf.programs()
                .into_iter()
                .filter(move |&at| Elf(image).u32(at) == kind)
        };
        let note = elf.u64(
            of_kind(PT_NOTE)
                .next()
                .unwrap_or_else(|| panic!("{name} has no note"))
                + 8,
        );
        assert_eq!(
            (elf.u32(note), elf.u32(note + 4)),
            (4, 8),
            "{name}: sizes of the note's name and descriptor"
        );
        assert_eq!(elf.u32(note + 8), XEN_ELFNOTE_PHYS32_ENTRY, "{name}");
        assert_eq!(&elf.field::<4>(note + 12), b"Xen\0", "{name}");
        let entry = elf.u64(note + 16);
        assert_eq!(entry, elf.u64(24), "{name}: the ELF entry is the PVH entry");
        let inside = of_kind(PT_LOAD).any(|at| {
            let (flags, start, bytes) = (elf.u32(at + 4), elf.u64(at + 24), elf.u64(at + 32));
            flags & 1 == 1 && (start..start + bytes).contains(&entry)
        });
        assert!(inside, "{name}: entry {entry:#x} is not in an executable segment");
        for at in of_kind(PT_LOAD) {
            assert!(elf.u64(at + 24) >= LOAD_ADDRESS, "{name} loads below 2 MiB");
            assert_eq!(
                elf.u64(at + 16),
                elf.u64(at + 24),
                "{name}: virtual and physical addresses are one"
            );
        }
    }
}

#[test]
fn write_all_writes_both() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    guest_images::write_all(dir.path()).expect("the directory is writable");
    for (name, image) in ALL {
        assert!(
            std::fs::read(dir.path().join(name)).expect("written") == image,
            "{name}"
        );
    }
    assert!(guest_images::write_all(&dir.path().join("absent")).is_err());
}
