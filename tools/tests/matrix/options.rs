//! What an image of the matrix is made with: eight options of the format and who works on the image. This file knows which
//! combinations the format allows, and their names on a command line and in a failure's message. It makes nothing.

use std::fmt;

/// The factors of the matrix, each with the names of its values. The order is that of [`Options`]'s numbers.
pub const FACTORS: [(&str, &[&str]); 9] = [
    (
        "cluster_size",
        &[
            "512", "1024", "2048", "4096", "8192", "16384", "32768", "65536", "131072", "262144",
            "524288", "1048576", "2097152",
        ],
    ),
    ("refcount_bits", &["1", "2", "4", "8", "16", "32", "64"]),
    ("compat", &["0.10", "1.1"]),
    ("extended_l2", &["off", "on"]),
    ("compression_type", &["zlib", "zstd"]),
    ("data_file", &["none", "data_file", "data_file_raw"]),
    ("encrypt", &["none", "luks", "aes"]),
    ("lazy_refcounts", &["off", "on"]),
    ("maker", &["qemu", "blk", "mixed"]),
];

/// Who works on an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maker {
    /// The installed programs alone.
    Qemu,
    /// `blk` alone.
    Blk,
    /// Each session is either's.
    Mixed,
}

/// Where guest data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFile {
    /// In the image.
    None,
    /// In a file of its own.
    External,
    /// In a file of its own that is the disk as the guest sees it.
    Raw,
}

/// How guest data is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    None,
    Luks,
    Aes,
}

/// One combination: for each factor the number of its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options(pub [u8; FACTORS.len()]);

impl Options {
    /// In bytes.
    pub fn cluster_size(self) -> u64 {
        512 << self.0[0]
    }

    pub fn refcount_bits(self) -> u32 {
        1 << self.0[1]
    }

    /// Version 2 of the format.
    pub fn is_version_2(self) -> bool {
        self.0[2] == 0
    }

    pub fn extended_l2(self) -> bool {
        self.0[3] == 1
    }

    pub fn data_file(self) -> DataFile {
        [DataFile::None, DataFile::External, DataFile::Raw][usize::from(self.0[5])]
    }

    pub fn encryption(self) -> Encryption {
        [Encryption::None, Encryption::Luks, Encryption::Aes][usize::from(self.0[6])]
    }

    pub fn maker(self) -> Maker {
        [Maker::Qemu, Maker::Blk, Maker::Mixed][usize::from(self.0[8])]
    }

    /// Whether such an image can exist.
    pub fn is_allowed(self) -> bool {
        let zstd = self.0[4] == 1;
        let lazy = self.0[7] == 1;
        let only_version_3 = self.refcount_bits() != 16
            || self.extended_l2()
            || zstd
            || lazy
            || self.data_file() != DataFile::None;
        !(self.is_version_2() && only_version_3
            || self.extended_l2() && self.cluster_size() < 16384)
    }

    /// Every combination that is allowed.
    pub fn all() -> impl Iterator<Item = Self> {
        let count: usize = FACTORS.iter().map(|(_, values)| values.len()).product();
        (0..count)
            .map(|mut number| {
                Self(FACTORS.map(|(_, values)| {
                    let value = number % values.len();
                    number /= values.len();
                    value as u8
                }))
            })
            .filter(|options| options.is_allowed())
    }

    /// The words for `-o`.
    pub fn for_create(self) -> String {
        let mut list = Vec::new();
        for (factor, (name, values)) in FACTORS.iter().enumerate().take(8) {
            let value = values[usize::from(self.0[factor])];
            match *name {
                "data_file" => match self.data_file() {
                    DataFile::None => {}
                    DataFile::External => list.push("data_file=data.raw".to_owned()),
                    DataFile::Raw => list.push("data_file=data.raw,data_file_raw=on".to_owned()),
                },
                "encrypt" => match self.encryption() {
                    Encryption::None => {}
                    Encryption::Luks => list.push(
                        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
                            .to_owned(),
                    ),
                    Encryption::Aes => {
                        list.push("encrypt.format=aes,encrypt.key-secret=key".to_owned());
                    }
                },
                _ => list.push(format!("{name}={value}")),
            }
        }
        list.join(",")
    }

    /// Reads what [`fmt::Display`] wrote.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = [None; FACTORS.len()];
        for item in text.split(',') {
            let (key, value) = item.split_once('=')?;
            let factor = FACTORS.iter().position(|(name, _)| *name == key)?;
            let number = FACTORS[factor].1.iter().position(|name| *name == value)?;
            numbers[factor] = Some(number as u8);
        }
        let mut options = Self([0; FACTORS.len()]);
        for (slot, number) in options.0.iter_mut().zip(numbers) {
            *slot = number?;
        }
        options.is_allowed().then_some(options)
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (factor, (name, values)) in FACTORS.iter().enumerate() {
            let comma = if factor == 0 { "" } else { "," };
            write!(f, "{comma}{name}={}", values[usize::from(self.0[factor])])?;
        }
        Ok(())
    }
}
