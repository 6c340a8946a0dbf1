//! A debugger's stops where guests have no debug registers.

use super::breakpoints::{kernel_function, program_functions, stops};
use super::*;

#[test]
#[ignore = "needs a KVM that can record"]
fn breakpoints_and_steps_work_in_the_kernel_and_in_a_program_without_debug_registers() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian.record(&recording, "hello", &[], b"").expect(0);
    let program = program_functions(&debian, "hello");
    let puts = program.iter().find(|(name, _)| name == "puts");
    let puts = puts.expect("it says something").1;
    let write = kernel_function(&debian, "ksys_write");
    let script = [
        &["continue"][..],
        &["stepi"; 3],
        &["continue"],
        &["stepi"; 3],
        &["reverse-stepi"; 3],
        &["reverse-continue", "delete", "continue"],
    ];
    // Its pages are not there yet: they are when it comes to run.
    let (places, ran) = stops(
        &debian,
        &recording,
        "end-800",
        &[puts, write],
        &script.concat(),
    );
    let at = |number: usize| places[number].0;
    assert_eq!((at(0), at(4)), (puts, write), "{places:x?}");
    assert!(at(1) != puts && at(5) != write, "{places:x?}");
    for back in 1..=3 {
        assert_eq!(places[7 + back], places[7 - back], "{places:x?}");
    }
    assert_eq!(places[11], places[0], "{places:x?}");
    assert!(
        ran.stderr.contains("the recording ends here: reset"),
        "{}",
        ran.stderr
    );
}
