//! A debugger's stops where guests have no debug registers.

use super::breakpoints::{kernel_function, program_functions, stops};
use super::*;
use hindsight_tests::both_ways;

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
    let function = |name: &str| {
        let found = program.iter().find(|(found, _)| found == name);
        found.unwrap_or_else(|| panic!("it has no {name}")).1
    };
    let functions = Functions {
        puts,
        getpid: function("getpid"),
        write: function("write"),
        in_kernel: write,
    };
    what_is_written_is_thrown_away(&debian, &recording, dir.path(), &functions);
}

/// Functions of `hello`, whose file in the guest has no symbols, and the kernel's for a write.
struct Functions {
    puts: u64,
    getpid: u64,
    write: u64,
    in_kernel: u64,
}

/// Calls functions of the program and of its kernel, writes a variable, and goes back; then the replay is equal to its end.
fn what_is_written_is_thrown_away(
    debian: &Debian,
    recording: &Path,
    dir: &Path,
    functions: &Functions,
) {
    let Functions {
        puts,
        getpid,
        write,
        in_kernel,
    } = functions;
    let script = format!(
        "\
break *{puts:#x}
continue
echo == in the program\\n
info registers
echo == called\\n
print ((int (*)(void)) {getpid:#x})()
print ((long (*)(int, unsigned long, long)) {write:#x})(1, $rdi, 4)
monitor when
echo == as it was\\n
info registers
echo == written\\n
set $rax = 77
set var *(long *) ($rsp - 64) = 78
print $rax + *(long *) ($rsp - 64)
delete
break *{in_kernel:#x}
continue
echo == in the kernel\\n
monitor when
print ((unsigned long (*)(unsigned long)) int_sqrt)(1444)
reverse-stepi
stepi
echo == where it began\\n
info registers
monitor when
continue
echo == in the recording's kernel\\n
info registers
print ((unsigned long (*)(unsigned long)) int_sqrt)(169)
end-diversion
echo == as that was\\n
info registers
delete
continue
"
    );
    let file = dir.join("diversions");
    std::fs::write(&file, script).expect("there is room");
    let arguments = ["debug", path(recording), "--at", "end-800", "--"];
    let ran = debian.run(&[&arguments[..], &["-batch", "-x", path(&file)]].concat());
    let text = ran.text();
    let pieces = text.split("== ").skip(1);
    let pieces: Vec<(&str, &str)> = pieces.filter_map(|p| p.split_once('\n')).collect();
    let piece = |name: &str| {
        let found = pieces.iter().find(|(piece, _)| *piece == name);
        let (_, text) = found.unwrap_or_else(|| panic!("no {name}: {text}\n{}", ran.stderr));
        *text
    };
    let registers = |name: &str| {
        let lines = piece(name).lines().filter(|line| line.contains("0x"));
        let lines = lines.take_while(|line| !line.starts_with("Breakpoint"));
        let lines: Vec<String> = lines.map(String::from).collect();
        assert!(lines.len() > 20, "{text}\n{}", ran.stderr);
        lines
    };
    let called = piece("called");
    for answer in ["$1 = 1\n", "$2 = 4\n"] {
        assert!(called.contains(answer), "{answer}: {text}\n{}", ran.stderr);
    }
    assert_eq!(registers("in the program"), registers("as it was"));
    assert!(piece("written").contains(" = 155\n"), "{text}");
    assert!(piece("in the kernel").contains(" = 38\n"), "{text}");
    assert_eq!(registers("in the program"), registers("where it began"));
    assert!(
        piece("in the recording's kernel").contains(" = 13\n"),
        "{text}"
    );
    assert_eq!(
        registers("in the recording's kernel"),
        registers("as that was")
    );
    let told = |what: &str| ran.stderr.matches(what).count();
    assert_eq!(told("begins a diversion"), 2, "{}", ran.stderr);
    assert_eq!(told("the diversion has ended"), 2, "{}", ran.stderr);
    // The digests of everything are equal at the end.
    assert_eq!(told("the recording ends here: reset"), 1, "{}", ran.stderr);

    let exits = debian.replay(recording, &["--json"]).expect(0).json();
    let exit = exits["exits"].as_u64().expect("a number") - 800;
    let mut debugger = both_ways::open(recording, exit);
    let ran_on = both_ways::divert(&mut debugger, exit, 6, 1);
    assert!(ran_on > 0, "no diversion came to an exit");
}
