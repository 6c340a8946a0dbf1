//! Goes back and forth in a recording, compares, and says how long going back takes.
//!
//! `reverse RECORDING KERNEL EXIT [STEPS [SEED]]`: at EXIT, STEPS (1000) random steps; then writes of `jiffies_64`
//! forwards and backwards. Panics if anything differs.

use std::path::Path;
use std::time::Instant;

use hindsight_kernel::{Symbols, unpack};
use hindsight_tests::both_ways::{open, time_runs_back, time_steps_back, walk, watch};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let usage = "reverse RECORDING KERNEL EXIT [STEPS [SEED]]";
    let mut argument = || arguments.next();
    let (recording, kernel) = (argument().expect(usage), argument().expect(usage));
    let mut number = |default: Option<u64>| {
        let text = argument();
        let number = text.map(|text| text.parse().expect("a number"));
        number.or(default).expect(usage)
    };
    let (exit, steps, seed) = (number(None), number(Some(1000)), number(Some(1)));
    let kernel = std::fs::read(kernel).expect("the kernel can be read");
    let kernel = unpack(&kernel).expect("it is a kernel");
    let symbols = Symbols::find(&kernel.elf).expect("it has symbols");
    let symbol = |name: &str| symbols.lookup(name).expect(name);
    let mut debugger = open(Path::new(&recording), exit);

    let back = time_steps_back(&mut debugger, exit, 100);
    println!(
        "100 steps back: median {:.1} ms, most {:.1} ms",
        back.median, back.most
    );
    let start = Instant::now();
    let writes = watch(&mut debugger, exit, symbol("jiffies_64"), 10);
    println!(
        "10 writes of jiffies_64 forwards and backwards in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    let runs = time_runs_back(&mut debugger, exit, writes[0], 10);
    println!(
        "10 runs back to where it is written: median {:.1} ms, most {:.1} ms",
        runs.median, runs.most
    );
    let start = Instant::now();
    walk(&mut debugger, exit, steps, seed);
    println!(
        "{steps} steps at random, and the same state, in {:.1} s",
        start.elapsed().as_secs_f64()
    );
}
