//! Reads bitmaps out of an image's bytes, from the specification and without the driver.
#![allow(dead_code)]

pub const IN_USE: u32 = 1;
pub const AUTO: u32 = 2;

/// A bitmap as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBitmap {
    pub name: String,
    pub flags: u32,
    pub granularity: u64,
    pub bits: Vec<bool>,
    /// Where its directory entry is.
    pub entry: usize,
    /// Where its table is.
    pub table: usize,
}

fn be32(data: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(data[at..at + 4].try_into().unwrap())
}

fn be64(data: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(data[at..at + 8].try_into().unwrap())
}

pub fn autoclear(data: &[u8]) -> u64 {
    be64(data, 88)
}

/// Where the data of the bitmaps extension is.
pub fn extension(data: &[u8]) -> Option<usize> {
    let mut at = be32(data, 100) as usize;
    loop {
        let (kind, len) = (be32(data, at), be32(data, at + 4) as usize);
        match kind {
            0 => return None,
            0x2385_2875 => return Some(at + 8),
            _ => at += 8 + len.next_multiple_of(8),
        }
    }
}

/// All bitmaps of an image, in the directory's order.
pub fn stored(data: &[u8]) -> Vec<StoredBitmap> {
    let Some(at) = extension(data) else {
        return Vec::new();
    };
    let cluster = 1usize << be32(data, 20);
    let disk = be64(data, 24);
    let count = be32(data, at);
    let mut entry = be64(data, at + 16) as usize;
    let end = entry + be64(data, at + 8) as usize;
    let mut found = Vec::new();
    for _ in 0..count {
        let table = be64(data, entry) as usize;
        let entries = be32(data, entry + 8) as usize;
        let granularity = 1u64 << data[entry + 17];
        let name_len = usize::from(u16::from_be_bytes([data[entry + 18], data[entry + 19]]));
        let extra = be32(data, entry + 20) as usize;
        let name = &data[entry + 24 + extra..entry + 24 + extra + name_len];
        let count = disk.div_ceil(granularity) as usize;
        let mut bits = Vec::with_capacity(count);
        for n in 0..entries {
            let raw = be64(data, table + n * 8);
            let here = (count - bits.len()).min(cluster * 8);
            match raw {
                0 | 1 => bits.extend(std::iter::repeat_n(raw == 1, here)),
                at => bits.extend((0..here).map(|bit| {
                    data.get(at as usize + bit / 8)
                        .is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
                })),
            }
        }
        assert_eq!(bits.len(), count, "the table covers the disk");
        found.push(StoredBitmap {
            name: String::from_utf8(name.to_vec()).unwrap(),
            flags: be32(data, entry + 12),
            granularity,
            bits,
            entry,
            table,
        });
        entry += (24 + extra + name_len).next_multiple_of(8);
    }
    assert_eq!(
        entry, end,
        "the directory has as many bytes as the header says"
    );
    found
}
