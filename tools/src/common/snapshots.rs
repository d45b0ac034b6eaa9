//! Internal snapshots as qemu's tools print them, and as their `-l` names one.

use block_core::{BlockHandle, ErrorKind, SnapshotInfo, SnapshotKey};
use serde_json::{Map, Value};

use super::{
    failure::Failure,
    open::{self, Access, ImageSpec},
    output::say,
    session::Session,
    size::human_size,
};

/// The start of a `-l` that consists of options.
const PARAMETER: &str = "snapshot.";

/// Prints the list with its head line.
pub fn print(indent: &str, snapshots: &[SnapshotInfo]) {
    say!("{indent}Snapshot list:");
    say!(
        "{indent}{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        "ID",
        "TAG",
        "VM_SIZE",
        "DATE",
        "VM_CLOCK",
        "ICOUNT"
    );
    for snapshot in snapshots {
        let seconds = snapshot.vm_clock_nsec / 1_000_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            snapshot.vm_clock_nsec / 1_000_000 % 1000
        );
        let icount = snapshot
            .icount
            .map_or_else(|| "--".to_owned(), |count| count.to_string());
        say!(
            "{indent}{:<7} {:<16} {:>8} {:>19} {clock:>15} {icount:>10}",
            snapshot.id,
            snapshot.name,
            human_size(snapshot.vm_state_size),
            local_date(snapshot.date_sec),
        );
    }
}

/// Date and time of day where the user is.
fn local_date(seconds: u32) -> String {
    jiff::Timestamp::from_second(i64::from(seconds))
        .map(|moment| jiff::tz::TimeZone::system().to_datetime(moment))
        .map(|local| local.strftime("%Y-%m-%d %H:%M:%S").to_string())
        .unwrap_or_default()
}

/// The elements of the `snapshots` array, with qemu-img's keys in its order.
pub fn to_json(snapshots: &[SnapshotInfo]) -> Value {
    let list = snapshots.iter().map(|snapshot| {
        let mut map = Map::new();
        if let Some(icount) = snapshot.icount {
            map.insert("icount".into(), icount.into());
        }
        let clock = snapshot.vm_clock_nsec;
        map.insert("vm-clock-nsec".into(), (clock % 1_000_000_000).into());
        map.insert("name".into(), snapshot.name.clone().into());
        map.insert("date-sec".into(), snapshot.date_sec.into());
        map.insert("date-nsec".into(), snapshot.date_nsec.into());
        map.insert("vm-clock-sec".into(), (clock / 1_000_000_000).into());
        map.insert("id".into(), snapshot.id.clone().into());
        map.insert("vm-state-size".into(), snapshot.vm_state_size.into());
        Value::Object(map)
    });
    list.collect()
}

/// What `-l` names: `snapshot.id=ID,snapshot.name=NAME`, or an identifier or a name.
///
/// # Errors
/// For options that don't exist.
pub fn parse(text: &str) -> Result<SnapshotKey, Failure> {
    if !text.starts_with(PARAMETER) {
        return Ok(SnapshotKey::IdOrName(text.to_owned()));
    }
    let bad = |message: String| {
        Failure::new(message).and(format!("Failed in parsing snapshot param '{text}'"))
    };
    let (mut id, mut name) = (None, None);
    for item in split(text) {
        let (key, value) = item.split_once('=').unwrap_or((&item, "on"));
        match key.strip_prefix(PARAMETER) {
            Some("id") => id = Some(value.to_owned()),
            Some("name") => name = Some(value.to_owned()),
            _ => return Err(bad(format!("Invalid parameter '{key}'"))),
        }
    }
    match (id, name) {
        (Some(id), Some(name)) => Ok(SnapshotKey::IdAndName(id, name)),
        (Some(id), None) => Ok(SnapshotKey::Id(id)),
        (None, Some(name)) => Ok(SnapshotKey::Name(name)),
        (None, None) => Err(bad("Missing snapshot.id or snapshot.name".to_owned())),
    }
}

/// The items of a list, in which two commas stand for one in a value.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

/// Opens what `image` was when the snapshot `key` was taken, read-only.
pub async fn open(
    session: &Session,
    image: ImageSpec<'_>,
    access: Access,
    key: &SnapshotKey,
) -> Result<BlockHandle, Failure> {
    let present = open::open(session, image, access).await?;
    let failed = |why: &str| Failure::new(format!("Failed to load snapshot: {why}"));
    let driver = present.node().driver().name();
    let listed = present.snapshot_list().await;
    present.close().await?;
    let snapshots = match listed {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            return Err(failed(&format!(
                "Block format '{driver}' used by device '' does not support temporarily loading internal snapshots"
            )));
        }
        Err(error) => return Err(failed(&error.reason()).with_details(&error)),
        Ok(snapshots) => snapshots,
    };
    let found = key
        .position(snapshots.iter().map(|info| (&*info.id, &*info.name)))
        .and_then(|index| snapshots.get(index))
        .ok_or_else(|| failed("Can't find snapshot"))?;
    let options = [
        ("snapshot-id", found.id.as_str()),
        ("snapshot-name", found.name.as_str()),
    ];
    open::open_with(session, image, access, &options)
        .await
        .map_err(|error| Failure::open(image.name, &error))
}
