//! A debugger's stops where guests have no debug registers.

use super::breakpoints::{kernel_functions, program_functions, stops};
use super::*;

#[test]
#[ignore = "needs a KVM that can record"]
fn breakpoints_and_steps_work_in_the_kernel_and_in_a_program_without_debug_registers() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian.record(&recording, "hello", &[], b"").expect(0);
    let program = program_functions(&debian, "hello");
    let puts = program.iter().find(|(name, _)| name == "puts");
    let (_, puts) = puts.expect("it says something");
    let all = [&kernel_functions(&debian, 30)[..], &[*puts]].concat();
    let there = [&["continue"; 30][..], &["stepi"; 30], &["reverse-stepi"; 3]].concat();
    let (forth, ran) = stops(&debian, &recording, "end-400", &all, &there);
    eprintln!("{forth:x?}\n{}", ran.stderr);
    assert!(forth.iter().any(|(pc, _)| pc == puts), "{forth:x?}");
}
