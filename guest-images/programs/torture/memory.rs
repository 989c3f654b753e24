//! Stamped pages, as the bare-metal `churn` writes and checks them, in a process of Linux.

use crate::content::{PAGE_WORDS, Recipe, mix64};
use crate::work::{Keys, Worker};

const PAGES_PER_MIB: u64 = 256;
/// Shares of zero, text-like and random pages.
const MIX: [u32; 3] = [20, 50, 30];
/// Pages checked for each one written.
const CHECKS: u64 = 3;

pub fn work(keys: &Keys) {
    let worker = Worker::begin("memory", &["written", "checked"]);
    let pages = keys.mib * PAGES_PER_MIB;
    let recipe = Recipe::new(keys.seed, MIX);
    let mut words = vec![0_u64; pages as usize * PAGE_WORDS];
    let mut counts = vec![0_u32; pages as usize];
    let (mut draw, mut checked) = (keys.seed, 0);
    loop {
        draw = mix64(draw);
        let page = draw % pages;
        let at = page as usize;
        counts[at] += 1;
        let content = &mut words[at * PAGE_WORDS..][..PAGE_WORDS];
        recipe
            .version(page, counts[at])
            .write(|index, word| content[index] = word);
        worker.add(0, 1);
        for _ in 0..CHECKS {
            checked = (checked + 1) % pages;
            let at = checked as usize;
            let content = &words[at * PAGE_WORDS..][..PAGE_WORDS];
            match counts[at] {
                // Memory from the kernel is zero.
                0 if content.iter().all(|word| *word == 0) => {}
                0 => worker.bad(format_args!("page {checked} was never written and is not zero")),
                count => {
                    if let Err(fault) = recipe.version(checked, count).check(|index| content[index]) {
                        worker.bad(format_args!(
                            "page {checked} write {count}: wrong {}",
                            fault.name()
                        ));
                    }
                }
            }
            worker.add(1, 1);
        }
    }
}
