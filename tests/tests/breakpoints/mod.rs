//! Breakpoints that gdb sets in a replay, and where they stop it.
#![allow(
    dead_code,
    reason = "each of the programs that have these tests uses some of it"
)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use hindsight_kernel::{Elf, Symbols};
use hindsight_tests::debian::{Debian, Ran};
use iced_x86::{Decoder, DecoderOptions, Mnemonic};

/// A stop: the program counter, and the exit and guest time before.
pub type Stop = (u64, String);

/// Where gdb was, one after the other, as these commands were given to it with these breakpoints set, from a moment on.
pub fn stops(
    debian: &Debian,
    recording: &Path,
    moment: &str,
    breakpoints: &[u64],
    commands: &[&str],
) -> (Vec<Stop>, Ran) {
    let mut script = "set breakpoint always-inserted on\n".to_string();
    for address in breakpoints {
        script += &format!("break *{address:#x}\n");
    }
    for command in commands {
        script += &format!("{command}\nprintf \"stop %lx\\n\", $pc\nwhen\n");
    }
    script += "monitor stops\n";
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let file = directory.path().join("script");
    std::fs::write(&file, script).expect("a temporary file is written");
    let paths = recording.to_str().zip(file.to_str());
    let (recording, file) = paths.expect("plain paths");
    let arguments = [
        "debug", recording, "--at", moment, "--", "-batch", "-x", file,
    ];
    let ran = debian.run(&arguments).expect(0);
    let text = ran.text();
    let counters = text.lines().filter_map(|line| line.strip_prefix("stop "));
    let counters = counters.map(|pc| u64::from_str_radix(pc, 16).expect(pc));
    let places = ran.stderr.lines();
    let places = places.filter(|line| line.contains("of guest time"));
    let stops: Vec<Stop> = counters.zip(places.map(String::from)).collect();
    assert_eq!(stops.len(), commands.len(), "{text}\n{}", ran.stderr);
    (stops, ran)
}

/// Functions of the guest's kernel that others call, so many of them all over it.
pub fn kernel_functions(debian: &Debian, count: usize) -> Vec<u64> {
    let image = std::fs::read(debian.kernel()).expect("the kernel is there");
    let kernel = hindsight_kernel::unpack(&image).expect("it is one");
    let elf = Elf::parse(&kernel.elf).expect("it has an ELF file");
    let text = elf.code.iter().find(|code| code.name == ".text");
    let text = text.expect("a kernel has text");
    let decoder = Decoder::with_ip(
        64,
        elf.bytes(&text.file),
        text.address,
        DecoderOptions::NONE,
    );
    let calls = decoder
        .into_iter()
        .filter(|i| i.mnemonic() == Mnemonic::Call);
    let end = text.address + text.file.len() as u64;
    let called = calls.map(|call| call.near_branch_target());
    let called: BTreeSet<u64> = called
        .filter(|at| (text.address..end).contains(at))
        .collect();
    let every = called.len() / count;
    called.into_iter().step_by(every).take(count).collect()
}

/// The functions of a guest's program, by name and address.
pub fn program_functions(debian: &Debian, image: &str) -> Vec<(String, u64)> {
    let program = debian.image(image);
    let program = program.with_file_name("programs").join(image);
    let arguments = ["-batch", "-ex", "info functions"];
    let said = Command::new("gdb").args(arguments).arg(program).output();
    let said = String::from_utf8(said.expect("gdb starts").stdout).expect("text");
    let functions = said.lines().filter_map(|line| {
        let (address, name) = line.split_once(' ')?;
        let address = u64::from_str_radix(address.strip_prefix("0x")?, 16).ok()?;
        Some((name.trim().to_string(), address))
    });
    functions.collect()
}

/// A function of the guest's kernel.
pub fn kernel_function(debian: &Debian, name: &str) -> u64 {
    let image = std::fs::read(debian.kernel()).expect("the kernel is there");
    let kernel = hindsight_kernel::unpack(&image).expect("it is one");
    let elf = Elf::parse(&kernel.elf).expect("it has an ELF file");
    let symbols = Symbols::find(elf.file()).expect("it has symbols");
    symbols.lookup(name).expect("it has that function")
}
