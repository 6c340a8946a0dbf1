//! `hindsight bench`: what recording and replaying cost, as ratios in one run.
//!
//! Whole processes are measured, in turn, so that a machine whose speed drifts slows all sides
//! alike; medians are quoted.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use crate::format::{bytes, thousands};

use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::session::MACHINE_CMDLINE;

use crate::options::{MachineOptions, RunPreemptOption};
use crate::outcome::Outcome;
use crate::tell::{out, tell};

/// Options of `bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each round runs the machine bare, records it, and replays the recording; with --against-qemu it is
also recorded by `qemu-system-x86_64 -icount shift=7,rr=record`, and with --against-kvm run by
`qemu-system-x86_64 -accel kvm,kernel-irqchip=off -M q35` with virtio disks. The guest must end by
itself.")]
pub(crate) struct Options {
    #[command(flatten)]
    machine: MachineOptions,
    /// Rounds.
    #[arg(long, short = 'n', default_value_t = 5)]
    rounds: usize,
    /// Also measure QEMU's own record/replay, in the same rounds, this many times in all.
    #[arg(long, value_name = "TIMES", num_args = 0..=1, default_missing_value = "1")]
    against_qemu: Option<usize>,
    /// Also run the machine in QEMU under KVM, in the same rounds, this many times in all.
    ///
    /// With its devices in QEMU, as ours are here.
    #[arg(long, value_name = "TIMES", num_args = 0..=1, default_missing_value = "1000000")]
    against_kvm: Option<usize>,
    /// Where the machine that is not recorded is preempted, if its guest does not exit.
    #[arg(long, value_enum, default_value_t)]
    run_preempt: RunPreemptOption,
    /// How long what is due waits for the guest that is not recorded to exit, in microseconds.
    #[arg(long, value_name = "US")]
    run_patience: Option<u64>,
    /// Where recordings are written and removed again.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Further options of `record`.
    #[arg(last = true, value_name = "OPTION")]
    record_options: Vec<String>,
}

/// One side's figures.
#[derive(Debug, Default, Serialize)]
struct Side {
    seconds: Vec<f64>,
    exits: u64,
    guest_ns: u64,
    time_reads: u64,
    preemptions: u64,
    journal_bytes: u64,
}

impl Side {
    fn median(&self) -> f64 {
        median(&self.seconds)
    }
}

#[derive(Debug, Serialize)]
struct Report {
    run: Side,
    record: Side,
    replay: Side,
    qemu: Side,
    kvm: Side,
    record_over_run: f64,
    replay_over_record: f64,
    qemu_over_record: Option<f64>,
    run_over_kvm: Option<f64>,
    record_over_kvm: Option<f64>,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let scratch = options.scratch.clone().unwrap_or_else(std::env::temp_dir);
    // A new directory of a name that nobody can have foreseen; it goes whatever happens.
    let directory = tempfile::Builder::new()
        .prefix("hindsight-bench-")
        .tempdir_in(&scratch);
    let at = |path: &Path| {
        let path = path.display().to_string();
        move |error: std::io::Error| Failure::from(error).about(path)
    };
    let directory = directory.map_err(at(&scratch))?;
    let result = measure(options, directory.path());
    let path = directory.path().to_path_buf();
    let removed = directory.close();
    let report = result?;
    removed.map_err(at(&path))?;
    if options.json {
        out!(
            "{}",
            serde_json::to_string(&report).expect("plain values serialise")
        );
    } else {
        print(&report);
    }
    Ok(Outcome::Good)
}

fn measure(options: &Options, directory: &Path) -> Result<Report, Failure> {
    let [mut run, mut record, mut replay, mut qemu, mut kvm] = [(); 5].map(|()| Side::default());
    let recording = directory.join("recording");
    let run_preempt = options.run_preempt.to_possible_value();
    let run_preempt = run_preempt.expect("each value can be given");
    for round in 1..=options.rounds {
        tell!("round {round} of {}", options.rounds);
        let mut command = hindsight("run")?;
        command.args(machine_arguments(&options.machine)).args([
            "--json",
            "--preempt",
            run_preempt.get_name(),
        ]);
        if let Some(us) = options.run_patience {
            command.arg(format!("--patience={us}"));
        }
        one(&mut run, &mut command)?;
        let mut command = hindsight("record")?;
        command
            .args(machine_arguments(&options.machine))
            .args(&options.record_options)
            .args(["--json", "-o"]);
        one(&mut record, command.arg(&recording))?;
        one(
            &mut replay,
            hindsight("replay")?.arg(&recording).arg("--json"),
        )?;
        // Not by --force, which takes care that no recording is lost.
        std::fs::remove_dir_all(&recording)
            .map_err(|error| Failure::from(error).about(recording.display()))?;
        if options.against_qemu.is_some_and(|times| round <= times) {
            qemu.seconds
                .push(time(&mut qemu_record(&options.machine, directory)?)?.0);
            let log = std::fs::metadata(directory.join("qemu.rr"))?;
            qemu.journal_bytes = log.len();
        }
        if options.against_kvm.is_some_and(|times| round <= times) {
            kvm.seconds.push(time(&mut qemu_kvm(&options.machine)?)?.0);
        }
    }
    let record_s = record.median();
    Ok(Report {
        record_over_run: paired_ratio(&record.seconds, &run.seconds),
        replay_over_record: paired_ratio(&replay.seconds, &record.seconds),
        qemu_over_record: (!qemu.seconds.is_empty()).then(|| qemu.median() / record_s),
        run_over_kvm: (!kvm.seconds.is_empty()).then(|| paired_ratio(&run.seconds, &kvm.seconds)),
        record_over_kvm: (!kvm.seconds.is_empty())
            .then(|| paired_ratio(&record.seconds, &kvm.seconds)),
        run,
        record,
        replay,
        qemu,
        kvm,
    })
}

fn hindsight(command: &str) -> Result<Command, Failure> {
    let mut process = Command::new(std::env::current_exe()?);
    process.arg(command);
    Ok(process)
}

fn machine_arguments(machine: &MachineOptions) -> Vec<std::ffi::OsString> {
    let mut arguments = vec!["--kernel".into(), machine.kernel.clone().into_os_string()];
    if let Some(initrd) = &machine.initrd {
        arguments.extend(["--initrd".into(), initrd.clone().into_os_string()]);
    }
    arguments.extend(["--memory".into(), machine.memory.to_string().into()]);
    arguments.push(format!("--cmdline={}", machine.cmdline).into());
    if machine.cmdline_exact {
        arguments.push("--cmdline-exact".into());
    }
    let console = machine.console.to_possible_value();
    let console = console.expect("each value can be given");
    arguments.push(format!("--console={}", console.get_name()).into());
    for disk in &machine.disks {
        arguments.extend(["--disk".into(), disk.text.clone().into()]);
    }
    arguments.extend(["--net".into(), machine.net.to_string().into()]);
    for publish in &machine.publish {
        arguments.extend(["--publish".into(), publish.to_string().into()]);
    }
    if let Some(how) = machine.time_reads {
        let how = how.to_possible_value().expect("each value can be given");
        arguments.push(format!("--time-reads={}", how.get_name()).into());
    }
    arguments
}

/// The same boot under QEMU's own recorder.
fn qemu_record(machine: &MachineOptions, directory: &Path) -> Result<Command, Failure> {
    let mut log = std::ffi::OsString::from("shift=7,rr=record,rrfile=");
    log.push(directory.join("qemu.rr"));
    let mut process = qemu(machine);
    process.args(["-accel", "tcg", "-icount"]).arg(log);
    Ok(process)
}

/// The same machine in QEMU under KVM, its interrupt controllers in QEMU too.
fn qemu_kvm(machine: &MachineOptions) -> Result<Command, Failure> {
    let mut process = qemu(machine);
    process.args([
        "-accel",
        "kvm,kernel-irqchip=off",
        "-M",
        "q35",
        "-cpu",
        // QEMU sets the MSR of this feature, which KVM refuses without a local APIC of its own.
        "host,kvm-asyncpf-int=off",
    ]);
    for disk in &machine.disks {
        let mut drive = std::ffi::OsString::from("format=raw,if=virtio,snapshot=on,file=");
        drive.push(&disk.wish.path);
        process.arg("-drive").arg(drive);
    }
    Ok(process)
}

/// QEMU with this kernel and what belongs to it.
fn qemu(machine: &MachineOptions) -> Command {
    // QEMU's machine has its own clocks and controllers: only the console and the reboot are ours.
    let words = match machine.words() {
        words if machine.cmdline_exact => words,
        words => words.replacen(MACHINE_CMDLINE, "console=ttyS0 panic=-1 reboot=k", 1),
    };
    let mut process = Command::new("qemu-system-x86_64");
    process.args([
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
        "-net",
        "none",
    ]);
    process.arg("-m").arg(format!("{}M", machine.memory >> 20));
    process.arg("-kernel").arg(&machine.kernel);
    if let Some(initrd) = &machine.initrd {
        process.arg("-initrd").arg(initrd);
    }
    process.arg("-append").arg(words);
    process
}

fn one(side: &mut Side, command: &mut Command) -> Result<(), Failure> {
    let (seconds, output) = time(command)?;
    side.seconds.push(seconds);
    let value: Value = serde_json::from_slice(&output)
        .map_err(|error| Failure::new(Kind::HostFailed, format!("reading a summary: {error}")))?;
    let summary = if value["summary"].is_object() {
        &value["summary"]
    } else {
        &value
    };
    let number = |name: &str| summary[name].as_u64().unwrap_or(0);
    let kind = |name: &str| summary["exits_by_kind"][name].as_u64().unwrap_or(0);
    side.exits = number("exits");
    side.guest_ns = number("guest_ns");
    side.journal_bytes = number("journal_bytes");
    side.preemptions = number("preemptions");
    side.time_reads = kind("kernel time reads") + kind("user time reads");
    Ok(())
}

fn time(command: &mut Command) -> Result<(f64, Vec<u8>), Failure> {
    command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped());
    let start = Instant::now();
    let output = command
        .output()
        .map_err(|error| Failure::from(error).about(format!("{command:?}")))?;
    let seconds = start.elapsed().as_secs_f64();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let message = format!("{command:?} ended with {}:\n{stderr}", output.status);
        return Err(Failure::new(Kind::HostFailed, message));
    }
    Ok((seconds, output.stdout))
}

/// The median of the ratios, round by round.
fn paired_ratio(a: &[f64], b: &[f64]) -> f64 {
    median(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>())
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn print(report: &Report) {
    for (name, side) in [
        ("run", &report.run),
        ("record", &report.record),
        ("replay", &report.replay),
    ] {
        let low = side.seconds.iter().copied().fold(f64::INFINITY, f64::min);
        let high = side.seconds.iter().copied().fold(0.0, f64::max);
        out!(
            "{name:<8} median {:.3} s ({low:.3} to {high:.3}), {} exits, {:.0} exits/s, {} preemptions",
            side.median(),
            thousands(side.exits),
            side.exits as f64 / side.median(),
            thousands(side.preemptions)
        );
    }
    out!(
        "record / run     {:.3}  (median of the rounds' ratios)",
        report.record_over_run
    );
    out!("replay / record  {:.3}", report.replay_over_record);
    let record = &report.record;
    out!(
        "journal          {}, {:.0} bytes per guest second, {:.2} bytes per time read ({})",
        bytes(record.journal_bytes),
        record.journal_bytes as f64 / (record.guest_ns.max(1) as f64 / 1e9),
        record.journal_bytes as f64 / record.time_reads.max(1) as f64,
        thousands(record.time_reads)
    );
    if let Some(ratio) = report.qemu_over_record {
        out!(
            "qemu rr=record   median {:.3} s, log {}: {ratio:.2} times as long",
            report.qemu.median(),
            bytes(report.qemu.journal_bytes)
        );
    }
    if let (Some(run), Some(record)) = (report.run_over_kvm, report.record_over_kvm) {
        out!(
            "qemu kvm         median {:.3} s; run / that {run:.3}, record / that {record:.3}",
            report.kvm.median()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{median, paired_ratio};

    #[test]
    fn medians_are_of_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(paired_ratio(&[2.0, 9.0, 4.0], &[1.0, 3.0, 4.0]), 2.0);
    }
}
