//! More breakpoints than there are debug registers.

use super::breakpoints::{Stop, kernel_functions, program_functions, stops};
use super::*;

/// From there to the end, in exits.
const BEFORE_END: &str = "end-800";
/// So often the guest is let go on, and back.
const GOES: usize = 40;
const BACK: usize = 8;

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn two_hundred_breakpoints_stop_where_few_do_and_the_replay_is_equal_to_its_end() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let options = ["--preempt", "entries"];
    debian.record(&recording, "hello", &options, b"").expect(0);

    let mut all = kernel_functions(&debian, 120);
    let program = program_functions(&debian, "hello");
    let puts = program.iter().find(|(name, _)| name == "puts");
    let (_, puts) = puts.expect("it says something");
    let every = program.len() / 79;
    all.extend(program.iter().step_by(every).take(79).map(|(_, at)| *at));
    all.push(*puts);
    all.sort_unstable();
    all.dedup();
    assert!(all.len() >= 195, "{}", all.len());

    let on = [
        &["continue"; GOES][..],
        &["reverse-continue"; BACK],
        &["delete", "continue"],
    ];
    let (many, ran) = stops(&debian, &recording, BEFORE_END, &all, &on.concat());
    let forth = &many[..GOES];
    assert!(forth.iter().all(|(pc, _)| all.contains(pc)), "{forth:x?}");
    // Where some of two hundred stopped the guest, few do, which have registers.
    let mut found: Vec<u64> = forth.iter().map(|(pc, _)| *pc).collect();
    found.sort_unstable();
    found.dedup();
    let some = [found[0], found[found.len() / 2], found[found.len() - 1]];
    let is_one = |stop: &&Stop| some.contains(&stop.0);
    let of_many: Vec<&Stop> = forth.iter().filter(is_one).collect();
    let goes = vec!["continue"; of_many.len()];
    let (of_few, _) = stops(&debian, &recording, BEFORE_END, &some, &goes);
    assert!(of_many.len() >= 3, "{of_many:x?}");
    assert!(
        of_many.iter().copied().eq(&of_few),
        "{of_many:x?}\n{of_few:x?}"
    );

    // They are come to in the other order on the way back, and the end is told where all digests were equal.
    let back = &many[GOES..GOES + BACK];
    let expected = forth[..GOES - 1].iter().rev().take(BACK);
    assert!(back.iter().eq(expected), "{back:x?}\n{forth:x?}");
    assert!(
        ran.stderr.contains("the recording ends here: reset"),
        "{}",
        ran.stderr
    );
}
