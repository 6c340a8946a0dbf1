//! Properties of the code itself.
//!
//! What the documents promise of the source (who may know whom, where unsafe code is, what the formats' versions are)
//! is read off the source here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The crates, each after those that it may depend on.
const CRATES: [&str; 5] = ["devices", "replay", "kernel", "vmm", "cli"];
/// A line is no longer, unless it is one string or a row of a table.
const LINE_CHARS: usize = 125;
/// A file is no longer without a reason at its top.
const FILE_LINES: usize = 600;
/// How a file says why it is longer.
const REASON: &str = "//! Long, because ";

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the workspace").to_path_buf()
}

/// The source files below a folder of the workspace, and what they say, in order.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        let entries = std::fs::read_dir(directory).expect("a folder of ours");
        for path in entries.map(|entry| entry.expect("a folder of ours").path()) {
            if path.is_dir() && !path.ends_with("target") {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    found.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("a file of ours");
        (path, text)
    };
    found.into_iter().map(read).collect()
}

/// What of a file is no test.
fn production(path: &Path, text: &str) -> String {
    let name = path.file_name().expect("a file").to_string_lossy();
    if name == "tests.rs" || name.ends_with("_tests.rs") || name == "testing.rs" {
        return String::new();
    }
    // A module for tests that stands in the file comes last.
    let starts = text.match_indices("#[cfg(test)]\n").map(|(at, _)| at);
    let mut bodies = starts.filter(|at| {
        let line = text[*at..].lines().nth(1).unwrap_or("");
        line.contains("mod ") && line.ends_with('{')
    });
    text[..bodies.next().unwrap_or(text.len())].into()
}

/// The lines of code, without comments, and their numbers.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let code = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""));
    (1..).zip(code)
}

/// Fails with all that was found.
fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

#[test]
fn no_line_is_longer_than_the_limit_but_strings_and_tables() {
    let mut found = Vec::new();
    for folder in CRATES.into_iter().chain(["tests", "guest-images"]) {
        for (path, text) in sources(folder) {
            for (number, line) in (1..).zip(text.lines()) {
                let words = line.trim_start();
                let excepted = words.starts_with(['"', '\''])
                    || words.starts_with("//! |")
                    || words.ends_with('\\');
                if line.chars().count() > LINE_CHARS && !excepted && !line.contains('"') {
                    found.push(format!("{}:{number}", path.display()));
                }
            }
        }
    }
    none("lines that are too long", &found);
}

#[test]
fn a_long_file_says_why_at_its_top() {
    let mut found = Vec::new();
    for folder in CRATES.into_iter().chain(["tests", "guest-images"]) {
        for (path, text) in sources(folder) {
            let lines = text.lines().count();
            let reason = text.lines().take(20).any(|line| line.starts_with(REASON));
            if lines > FILE_LINES && !reason {
                found.push(format!("{} has {lines} lines", path.display()));
            }
        }
    }
    none("long files without a reason", &found);
}

#[test]
fn unsafe_code_is_where_the_documents_say() {
    let mut found = Vec::new();
    for folder in CRATES
        .into_iter()
        .chain(["tests/src", "tests/tests", "guest-images/src"])
    {
        for (path, text) in sources(folder) {
            let shown = path
                .strip_prefix(root())
                .expect("below the root")
                .to_string_lossy();
            let allowed = shown.starts_with("vmm/src/kvm/") || shown == "vmm/src/perf/sys.rs";
            for (number, line) in code_lines(&text) {
                let is_unsafe = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
                if !allowed && is_unsafe.iter().any(|word| line.contains(word)) {
                    let quoted = line.contains('"');
                    if !quoted {
                        found.push(format!("{shown}:{number}"));
                    }
                }
            }
        }
    }
    none("unsafe code elsewhere", &found);
}

/// Whether `text` uses `name` as a word of its own.
fn names(text: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + name.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[test]
fn what_decides_what_a_guest_sees_knows_no_clock_thread_file_or_float() {
    const ABSENT: [&str; 14] = [
        "std::time",
        "std::thread",
        "std::fs",
        "std::net",
        "std::env",
        "std::process",
        "HashMap",
        "HashSet",
        "Instant",
        "SystemTime",
        "f32",
        "f64",
        "libc",
        "rand",
    ];
    let mut found = Vec::new();
    for folder in ["devices/src", "replay/src", "kernel/src"] {
        for (path, text) in sources(folder) {
            let text = production(&path, &text);
            for (number, line) in code_lines(&text) {
                for word in ABSENT.iter().filter(|word| names(line, word)) {
                    found.push(format!("{}:{number}: {word}", path.display()));
                }
            }
        }
    }
    none("what is absent there", &found);
}

#[test]
fn below_the_program_nothing_prints_exits_or_parses_options() {
    const ABSENT: [&str; 7] = [
        "println!",
        "eprintln!",
        "print!",
        "eprint!",
        "dbg!",
        "process::exit",
        "clap",
    ];
    let mut found = Vec::new();
    for folder in ["devices/src", "replay/src", "kernel/src", "vmm/src"] {
        for (path, text) in sources(folder) {
            let text = production(&path, &text);
            for (number, line) in code_lines(&text) {
                for word in ABSENT.iter().filter(|word| line.contains(**word)) {
                    found.push(format!("{}:{number}: {word}", path.display()));
                }
            }
        }
    }
    none("what only the program does", &found);
}

/// The folders (and files) at the top of a crate, and which of them each names.
fn imports(name: &str) -> BTreeMap<String, BTreeSet<String>> {
    let source = root().join(name).join("src");
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut files = Vec::new();
    for (path, text) in sources(&format!("{name}/src")) {
        let below = path.strip_prefix(&source).expect("below the crate");
        let top = below.iter().next().expect("a file").to_string_lossy();
        let top = top.trim_end_matches(".rs").to_string();
        if !["lib", "main", "testing"].contains(&&*top) {
            graph.entry(top.clone()).or_default();
            files.push((top, production(&path, &text)));
        }
    }
    let tops: Vec<String> = graph.keys().cloned().collect();
    for (top, text) in files {
        let code: Vec<&str> = code_lines(&text).map(|(_, line)| line).collect();
        let code = code.join("\n");
        let named = tops
            .iter()
            .filter(|other| **other != top && names(&code, &format!("crate::{other}")));
        graph.entry(top.clone()).or_default().extend(named.cloned());
    }
    graph
}

/// A circle in a graph, if there is one.
fn circle(graph: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn visit(
        at: &str,
        graph: &BTreeMap<String, BTreeSet<String>>,
        path: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<String>> {
        if let Some(start) = path.iter().position(|name| name == at) {
            return Some(path[start..].to_vec());
        }
        if !done.insert(at.into()) {
            return None;
        }
        path.push(at.into());
        let found = graph[at]
            .iter()
            .find_map(|next| visit(next, graph, path, done));
        path.pop();
        found
    }
    let mut done = BTreeSet::new();
    graph
        .keys()
        .find_map(|name| visit(name, graph, &mut Vec::new(), &mut done))
}

#[test]
fn folders_import_each_other_one_way() {
    for name in ["replay", "kernel", "vmm", "cli"] {
        let graph = imports(name);
        assert!(graph.len() > 2, "{name}: {graph:?}");
        assert_eq!(circle(&graph), None, "{name}: {graph:?}");
    }
    // A test that cannot fail would be none.
    let edge = |to: &str| BTreeSet::from([to.to_string()]);
    let graph = BTreeMap::from([("a".into(), edge("b")), ("b".into(), edge("a"))]);
    assert!(circle(&graph).is_some());
}

/// The names of what a crate depends on, in a section of its manifest.
fn dependencies(manifest: &str, section: &str) -> Vec<String> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line == format!("[{section}]");
        } else if inside && let Some((name, _)) = line.split_once(['.', ' ', '=']) {
            found.push(name.replace('-', "_"));
        }
    }
    found
}

#[test]
fn crates_depend_on_what_they_use_and_one_way() {
    let mut found = Vec::new();
    for (index, name) in CRATES.into_iter().enumerate() {
        let manifest =
            std::fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest");
        let text: String = sources(name).into_iter().map(|(_, text)| text).collect();
        for dependency in dependencies(&manifest, "dependencies") {
            if let Some(ours) = dependency.strip_prefix("hindsight_") {
                let ours = CRATES.iter().position(|other| *other == ours);
                if ours.is_some_and(|ours| ours >= index) {
                    found.push(format!("{name} depends on {dependency}"));
                }
            }
            if !names(&text, &dependency) {
                found.push(format!("{name} does not use {dependency}"));
            }
        }
    }
    none("dependencies", &found);
    let kernel = std::fs::read_to_string(root().join("kernel/Cargo.toml")).expect("a manifest");
    let ours = dependencies(&kernel, "dependencies");
    assert!(
        !ours
            .iter()
            .any(|name| name.starts_with("hindsight_") || name.starts_with("kvm"))
    );
}

#[test]
fn the_documents_have_the_formats_version() {
    let version = hindsight_replay::VERSION;
    let text = std::fs::read_to_string(root().join("docs/journal-format.md")).expect("a document");
    assert!(
        text.contains(&format!("The format version is **{version}**.")),
        "{version}"
    );
}
