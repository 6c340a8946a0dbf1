//! The fuzz targets' corpus, and some hundred inputs made of seeds: they run as everything else does, with
//! nothing but cargo. `scripts/fuzz` looks for new ones.

use std::path::PathBuf;

use hindsight_replay::rng::Rng;
use hindsight_tests::drive::{Target, drive};

const SEEDS: u64 = 500;

fn corpus(target: Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target.name());
    let files = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", folder.display()));
    let mut paths: Vec<_> = files.map(|file| file.expect("it reads").path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let bytes = std::fs::read(&path).expect("it reads");
            (path, bytes)
        })
        .collect()
}

/// The name is shown if the input panics.
fn run(target: Target, name: &str, data: &[u8]) {
    struct Named<'a>(&'a str);
    impl Drop for Named<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("the input is {}", self.0);
            }
        }
    }
    let _named = Named(name);
    drive(target, data);
}

#[test]
fn every_input_of_the_corpus_is_survived() {
    for target in Target::ALL {
        let corpus = corpus(target);
        assert!(!corpus.is_empty(), "no input for {}", target.name());
        for (path, data) in corpus {
            run(target, &path.display().to_string(), &data);
        }
    }
}

#[test]
fn random_bytes_are_survived() {
    for target in Target::ALL {
        for seed in 0..SEEDS {
            let mut rng = Rng::new(seed, 7);
            let length = 16 + rng.below(700);
            let data: Vec<u8> = (0..length).map(|_| rng.number() as u8).collect();
            run(target, &format!("{} of seed {seed}", target.name()), &data);
        }
    }
}
