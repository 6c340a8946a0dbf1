//! From the end of a run back to who wrote something last, in gdb, without any file of this host.

use super::{debugged, scratch};
use hindsight_tests::debian::Debian;

/// The piece of this name.
fn piece<'a>(pieces: &'a [(String, String)], name: &str) -> &'a str {
    let found = pieces.iter().find(|(piece, _)| piece == name);
    let (_, text) = found.unwrap_or_else(|| panic!("no {name}: {pieces:?}"));
    text
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn gdb_finds_the_last_write_of_an_account_and_names_the_function_and_its_line() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    // Whether it comes out right or crashes is all the same here.
    debian.record(&recording, "race", &[], b"").expect(0);
    // Process 1 is in the kernel, which it has asked for a restart, or which panics because of it.
    let script = "\
seek end
echo == the kernel\\n
info symbol panic
info symbol do_syscall_64
echo == the program\\n
guest-program
info line transfer
echo == the audit\\n
break audit
reverse-continue
backtrace
set $bank = bank
set $last = $bank->teller[1].records - 1
set $account = $bank->teller[1].trail[$last].to
set $balance = $bank->balance[$account]
delete
echo == the write\\n
watch -l $bank->balance[$account]
reverse-continue
echo == where\\n
backtrace
info line *$pc
echo == over it\\n
delete
stepi
print $bank->balance[$account] == $balance
echo == the end\\n
";
    let (ran, pieces) = debugged(&debian, &recording, script);
    let piece = |name| piece(&pieces, name);
    assert!(
        piece("the kernel").contains("panic in section .text"),
        "{}",
        ran.text()
    );
    assert!(
        piece("the kernel").contains("do_syscall_64 in section"),
        "{}",
        ran.text()
    );
    assert!(
        piece("the program").contains("race.c"),
        "{}\n{}",
        ran.text(),
        ran.stderr
    );
    assert!(
        piece("the audit").contains("Breakpoint 1, audit (bank="),
        "{}",
        ran.text()
    );
    assert!(piece("the audit").contains("in main ()"), "{}", ran.text());
    assert!(
        piece("the write").contains("Hardware watchpoint 2"),
        "{}",
        ran.text()
    );
    let place = piece("where");
    // The innermost frame, and the one that it was called from.
    assert!(
        place.contains("#0") && place.contains("transfer (bank="),
        "{place}"
    );
    assert!(place.contains("in serve (bank="), "{place}");
    let source = include_str!("../../../guest-images/programs/race.c");
    let writes = |number: usize| {
        let line = source.lines().nth(number - 1).unwrap_or_default();
        line.contains("bank->balance[") && line.contains("] = ")
    };
    let named = place.split("race.c:").nth(1).unwrap_or_default();
    let digits = named.split(|c: char| !c.is_ascii_digit()).next();
    let number = digits.and_then(|digits| digits.parse().ok());
    assert!(number.is_some_and(writes), "{place}");
    assert!(piece("over it").contains(" = 1"), "{}", ran.text());
}
