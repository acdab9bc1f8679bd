//! Compiled programs on disk.

use lapidary_pjrt::{CompileOptions, ExecutableCache, Lookup};

use crate::basics::ADD;
use crate::common::{client, f32s, put};

fn run(cache: &ExecutableCache, program: &str, options: &CompileOptions) -> Lookup {
    let (add, outcome) = client().compile_cached(program, options, Some(cache)).unwrap();
    assert_eq!(outcome.store_error, None);
    let x = put(&f32s(&[3], &[1.0, 2.0, 3.0]));
    let r = add.execute(&[&x, &x]).unwrap()[0].to_host().unwrap();
    assert_eq!(r.as_slice::<f32>().unwrap(), &[2.0, 4.0, 6.0]);
    assert_eq!(add.name(), "add");
    assert_eq!(add.signature().inputs.len(), 2);
    outcome.lookup
}

#[test]
fn the_second_time_is_a_hit_and_damage_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ExecutableCache::new(dir.path()).unwrap();
    let options = CompileOptions::default();
    assert_eq!(run(&cache, ADD, &options), Lookup::Miss);
    assert_eq!(run(&cache, ADD, &options), Lookup::Hit);

    // Another program and other options are other entries.
    let other = ADD.replace("%r", "%s");
    assert_eq!(run(&cache, &other, &options), Lookup::Miss);
    let changed = options.clone().with("xla_allow_excess_precision", false);
    assert_eq!(run(&cache, ADD, &changed), Lookup::Miss);
    assert_eq!(run(&cache, ADD, &options.clone().on_devices([0])), Lookup::Miss);

    for entry in fs_err::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs_err::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs_err::write(&path, bytes).unwrap();
    }
    assert_eq!(run(&cache, ADD, &options), Lookup::Damaged("its checksum is wrong".to_owned()));
    assert_eq!(run(&cache, ADD, &options), Lookup::Hit);

    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.damaged, stats.stored, stats.pruned), (2, 4, 1, 5, 0));
}

#[test]
fn without_a_cache_and_with_one_that_cannot_be_written() {
    let options = CompileOptions::default();
    assert_eq!(client().compile_cached(ADD, &options, None).unwrap().1.lookup, Lookup::Off);
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    let cache = ExecutableCache::new(&gone).unwrap();
    fs_err::remove_dir_all(&gone).unwrap();
    let (_, outcome) = client().compile_cached(ADD, &options, Some(&cache)).unwrap();
    assert_eq!(outcome.lookup, Lookup::Miss);
    assert!(outcome.store_error.unwrap().contains("gone"));
}
