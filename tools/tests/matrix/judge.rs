//! The judge of an image: both sides' `check` calls it clean, both say the same of it, and both read the oracle's bytes, now and
//! in every snapshot. It changes nothing.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    model::{Disk, World},
    options::Maker,
    run::{Bench, Side, words},
};

/// All there is to say of an image.
pub fn everything(bench: &mut Bench<'_>, world: &World) -> Result<(), String> {
    clean(bench)?;
    said(bench, world)?;
    disk(bench, &world.disk)?;
    for (name, content) in &world.snapshots {
        snapshot(bench, name, content, world.disk.size())?;
    }
    if let Some(raw) = bench.raw_data_file() {
        let mut bytes = fs::read(raw).map_err(|error| error.to_string())?;
        // qemu-io writes whole clusters of zeroes, also where the disk ends within one.
        let options = bench.image.options;
        if options.maker() != Maker::Blk && bytes.len() as u64 <= world.disk.cut_end() {
            bytes.truncate(world.disk.bytes.len());
        }
        same("the raw data file", &bytes, &world.disk.bytes)?;
    }
    Ok(())
}

/// Both sides' `check` finds nothing.
pub fn clean(bench: &mut Bench<'_>) -> Result<(), String> {
    for side in Side::BOTH {
        let said = bench.image_command(side, "check", "")?;
        if said.status != 0 {
            return Err(format!("{side:?}: check: {said:?}"));
        }
    }
    Ok(())
}

/// Both sides read the disk as it is.
pub fn disk(bench: &mut Bench<'_>, content: &Disk) -> Result<(), String> {
    for side in Side::BOTH {
        let what = format!("{side:?}: the disk");
        let bytes = read(bench, side, "")?;
        same(&what, &bytes, &content.bytes)?;
    }
    Ok(())
}

/// Both sides read a snapshot. qemu-img gives it the size that the disk has now.
fn snapshot(bench: &mut Bench<'_>, name: &str, content: &Disk, now: u64) -> Result<(), String> {
    for side in Side::BOTH {
        let what = format!("{side:?}: snapshot {name}");
        let mut bytes = read(bench, side, &format!("-l snapshot.name={name}"))?;
        let mut expected = &content.bytes[..];
        if side == Side::Qemu {
            let common = content.size().min(now) as usize;
            if bytes.len() as u64 != now {
                return Err(format!("{what} has {} bytes, not {now}", bytes.len()));
            }
            bytes.truncate(common);
            expected = &expected[..common];
        }
        same(&what, &bytes, expected)?;
    }
    Ok(())
}

fn read(bench: &mut Bench<'_>, side: Side, options: &str) -> Result<Vec<u8>, String> {
    let mut args = words(&format!("convert -O raw {options}"));
    args.extend(bench.opening());
    args.push("read.raw".to_owned());
    bench.succeed(side, "qemu-img", &args)?;
    let path = bench.dir.join("read.raw");
    let bytes = fs::read(&path).map_err(|error| error.to_string())?;
    fs::remove_file(&path).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn same(what: &str, found: &[u8], expected: &[u8]) -> Result<(), String> {
    if found == expected {
        return Ok(());
    }
    if found.len() != expected.len() {
        return Err(format!(
            "{what} has {} bytes, not {}",
            found.len(),
            expected.len()
        ));
    }
    let differing: Vec<usize> = (0..found.len())
        .filter(|at| found[*at] != expected[*at])
        .collect();
    let (first, last) = (differing[0], differing[differing.len() - 1]);
    let shown = first..(first + 16).min(found.len());
    Err(format!(
        "{what}: {} bytes differ between {first:#x} and {last:#x}: {:02x?} instead of {:02x?}",
        differing.len(),
        &found[shown.clone()],
        &expected[shown],
    ))
}

/// Both sides' `info` agrees, and has the disk's size and snapshots.
fn said(bench: &mut Bench<'_>, world: &World) -> Result<(), String> {
    let mut answers = Vec::new();
    for side in Side::BOTH {
        // Nobody needs a key for what an image says of itself.
        let args = words("info --output=json -f qcow2 disk.qcow2");
        let said = bench.succeed(side, "qemu-img", &args)?;
        let mut value: Value =
            serde_json::from_str(&said.out).map_err(|error| format!("{side:?}: {error}"))?;
        forget_storage(&mut value);
        answers.push(value);
    }
    let (theirs, ours) = (&answers[0], &answers[1]);
    if theirs != ours {
        return Err(format!("info: theirs {theirs}\nours   {ours}"));
    }
    if ours["virtual-size"] != world.disk.size() {
        return Err(format!(
            "info: {} bytes, not {}",
            ours["virtual-size"],
            world.disk.size()
        ));
    }
    let listed = ours["snapshots"].as_array().into_iter().flatten();
    let listed: Vec<&str> = listed.filter_map(|one| one["name"].as_str()).collect();
    let expected: Vec<&str> = world.snapshots.iter().map(|(name, _)| &**name).collect();
    if listed != expected {
        return Err(format!("info: snapshots {listed:?}, not {expected:?}"));
    }
    let specific = &ours["format-specific"]["data"];
    for (key, value) in [
        ("corrupt", false),
        ("extended-l2", bench.image.options.extended_l2()),
    ] {
        if !specific[key].is_null() && specific[key] != value {
            return Err(format!("info: {key} is {}", specific[key]));
        }
    }
    Ok(())
}

/// How much of the host's disk a file takes is nobody's promise.
fn forget_storage(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(forget_storage),
        Value::Object(map) => {
            map.remove("actual-size");
            map.values_mut().for_each(forget_storage);
        }
        _ => {}
    }
}

/// Changes one byte of guest data in the file `image`, wherever it finds 64 bytes of `content` that are in no other place.
/// Gives whether it did.
pub fn spoil_a_byte(image: &Path, content: &[u8]) -> bool {
    let mut file = fs::read(image).unwrap();
    let found = content
        .chunks_exact(64)
        .filter(|chunk| chunk.iter().filter(|byte| **byte != 0).count() > 32)
        .find_map(|chunk| file.windows(64).position(|window| window == chunk));
    let Some(at) = found else { return false };
    file[at + 13] ^= 0x40;
    fs::write(image, file).unwrap();
    true
}
