//! More breakpoints than there are debug registers.

use super::breakpoints::{Stop, kernel_functions, program_functions, stops};
use super::*;

/// From there to the end, in exits.
const BEFORE_END: &str = "end-500";
/// So often the guest is let go on; at the end it stays there.
const GOES: usize = 60;

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

    let on = [&["continue"; GOES][..], &["reverse-continue"; 8]].concat();
    let (many, ran) = stops(&debian, &recording, BEFORE_END, &all, &on);
    eprintln!("{many:x?}\n{}", ran.stderr);
    let forth = &many[..GOES];
    // Where one of two hundred stopped the guest, few do, which have registers.
    let mut found: Vec<u64> = forth.iter().map(|(pc, _)| *pc).collect();
    found.retain(|pc| pc != puts && all.contains(pc));
    found.sort_unstable();
    found.dedup();
    let some = [&found[..found.len().min(2)], &[*puts]].concat();
    let is_one = |stop: &&Stop| some.contains(&stop.0);
    let (few, _) = stops(&debian, &recording, BEFORE_END, &some, &on[..GOES]);
    let of_many: Vec<&Stop> = forth.iter().filter(is_one).collect();
    let of_few: Vec<&Stop> = few.iter().filter(is_one).collect();
    let both = of_many.len().min(of_few.len());
    assert!(both >= 3, "{of_many:x?} {of_few:x?}");
    assert_eq!(of_many[..both], of_few[..both]);
    assert!(
        of_few.iter().any(|(pc, _)| pc == puts),
        "the program is stopped"
    );

    // The end is told where all digests were equal, and from there they are come to in the other order.
    assert!(
        ran.stderr.contains("the recording ends here: reset"),
        "{}",
        ran.stderr
    );
    let mut distinct: Vec<&Stop> = forth.iter().filter(|(pc, _)| all.contains(pc)).collect();
    distinct.reverse();
    let back: Vec<&Stop> = many[GOES..].iter().collect();
    let count = back.len().min(distinct.len());
    assert_eq!(back[..count], distinct[..count]);
}
