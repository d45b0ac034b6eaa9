//! What goes where in a new image. Pure arithmetic, also used to measure.
//!
//! In this order, each part beginning at a cluster: header, refcount table, refcount blocks, L1 table, and, when the
//! image is preallocated, L2 tables and data. For an image that needs one refcount table cluster and one block this is
//! the layout that QEMU makes.

use block_core::{
    driver::Preallocation,
    error::{Error, ErrorKind, Result},
};

use crypto::EncryptionFormat;

use super::Parameters;
use crate::{
    compress::Codec,
    layout::{
        Autoclear, Compatible, Extensions, Geometry, Header, HostOffset, Incompatible,
        extensions::LuksPointer,
        header::{MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES},
    },
};

/// Sizes of the parts of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The sizes that follow from the parameters.
    pub geometry: Geometry,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u64,
    /// Refcount blocks, one cluster each.
    pub refcount_blocks: u64,
    /// Entries of the L1 table.
    pub l1_entries: u64,
    /// Clusters of the LUKS header and its key material.
    pub luks_clusters: u64,
    /// L2 tables, one cluster each; 0 unless preallocated.
    pub l2_tables: u64,
    /// Data clusters; 0 unless preallocated, and with an external data file.
    pub data_clusters: u64,
    /// Guest clusters that the L2 tables map; 0 unless preallocated.
    pub mapped_clusters: u64,
    /// All clusters, the header's included.
    pub total_clusters: u64,
}

/// The disk is too large for the format with this cluster size.
pub(crate) fn too_large(message: &str, parameters: &Parameters) -> Error {
    Error::new(ErrorKind::TooBig, message).with_field(
        "size",
        parameters.size,
        format!(
            "what fits with clusters of {} bytes",
            1u64 << parameters.cluster_bits
        ),
    )
}

impl Plan {
    /// The plan of an image with these parameters.
    ///
    /// # Errors
    /// EFBIG when the disk is too large for the format.
    pub fn new(parameters: &Parameters) -> Result<Self> {
        let preallocated =
            parameters.preallocation != Preallocation::Off || parameters.data_file_raw;
        let storable = |plan: &Self| {
            plan.refcount_table_clusters * plan.geometry.cluster_size() <= MAX_REFCOUNT_TABLE_BYTES
        };
        Self::with_data(parameters, preallocated).filter(storable).ok_or_else(|| {
            too_large(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
                parameters,
            )
        })
    }

    /// The plan of an image that holds data everywhere (`data`) or nowhere, however large its refcount table gets.
    /// `None` when the L1 table would be too large.
    pub(crate) fn with_data(parameters: &Parameters, data: bool) -> Option<Self> {
        let geometry = parameters.geometry();
        let cluster_size = geometry.cluster_size();
        if parameters.size > i64::MAX as u64 {
            return None;
        }
        let l1_entries = geometry.l1_entries_for(parameters.size);
        if l1_entries * 8 > MAX_L1_BYTES {
            return None;
        }
        let mapped_clusters = if data {
            geometry.clusters_for(parameters.size)
        } else {
            0
        };
        let data_clusters = if parameters.data_file.is_some() {
            0
        } else {
            mapped_clusters
        };
        let l2_tables = if data { l1_entries } else { 0 };
        let luks = parameters.encryption.map_or(0, |format| format.area_len());
        let luks_clusters = geometry.clusters_for(luks);
        let fixed =
            1 + geometry.clusters_for(l1_entries * 8) + luks_clusters + l2_tables + data_clusters;

        // Blocks and table describe themselves too. Both only grow from round to round, and each round adds less.
        let (mut table, mut blocks) = (1, 1);
        loop {
            let total = fixed + table + blocks;
            let needed_blocks = total.div_ceil(geometry.refcounts_per_block());
            let needed_table = (needed_blocks * 8).div_ceil(cluster_size);
            if (needed_table, needed_blocks) == (table, blocks) {
                return Some(Self {
                    geometry,
                    refcount_table_clusters: table,
                    refcount_blocks: blocks,
                    l1_entries,
                    luks_clusters,
                    l2_tables,
                    data_clusters,
                    mapped_clusters,
                    total_clusters: total,
                });
            }
            (table, blocks) = (needed_table, needed_blocks);
        }
    }

    fn at(&self, cluster: u64) -> HostOffset {
        HostOffset(cluster * self.geometry.cluster_size())
    }

    /// Where the refcount table is.
    pub fn refcount_table_offset(&self) -> HostOffset {
        self.at(1)
    }

    /// Where the first refcount block is.
    pub fn refcount_block_offset(&self) -> HostOffset {
        self.at(1 + self.refcount_table_clusters)
    }

    /// Where the L1 table is.
    pub fn l1_offset(&self) -> HostOffset {
        self.at(1 + self.refcount_table_clusters + self.refcount_blocks)
    }

    /// Where the LUKS header is, if there is one.
    pub fn luks_offset(&self) -> HostOffset {
        let l1_clusters = self.geometry.clusters_for(self.l1_entries * 8);
        HostOffset(self.l1_offset().0 + self.at(l1_clusters).0)
    }

    /// Where the first L2 table is.
    pub fn l2_offset(&self) -> HostOffset {
        HostOffset(self.luks_offset().0 + self.at(self.luks_clusters).0)
    }

    /// Where the data is.
    pub fn data_offset(&self) -> HostOffset {
        HostOffset(self.l2_offset().0 + self.at(self.l2_tables).0)
    }

    /// The end of the last cluster, in bytes.
    pub fn end(&self) -> u64 {
        self.at(self.total_clusters).0
    }

    /// The header of the new image.
    pub fn header(&self, parameters: &Parameters) -> Header {
        let mut incompatible = Incompatible::empty();
        incompatible.set(Incompatible::EXTENDED_L2, parameters.extended_l2);
        let mut compatible = Compatible::empty();
        compatible.set(Compatible::LAZY_REFCOUNTS, parameters.lazy_refcounts);
        incompatible.set(Incompatible::COMPRESSION, parameters.codec != Codec::Zlib);
        incompatible.set(Incompatible::DATA_FILE, parameters.data_file.is_some());
        let mut autoclear = Autoclear::empty();
        autoclear.set(Autoclear::RAW_DATA_FILE, parameters.data_file_raw);
        Header {
            version: parameters.version,
            cluster_bits: parameters.cluster_bits,
            size: parameters.size,
            crypt_method: match parameters.encryption {
                None => 0,
                Some(EncryptionFormat::Aes) => 1,
                Some(EncryptionFormat::Luks(_)) => 2,
            },
            l1_size: self.l1_entries as u32,
            l1_table_offset: if self.l1_entries == 0 {
                HostOffset(0)
            } else {
                self.l1_offset()
            },
            refcount_table_offset: self.refcount_table_offset(),
            refcount_table_clusters: self.refcount_table_clusters as u32,
            nb_snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible,
            compatible,
            autoclear,
            refcount_order: parameters.refcount_order,
            compression_type: parameters.codec.to_type(),
            unknown_tail: Vec::new(),
            backing_file: parameters
                .backing_file
                .as_ref()
                .map(|name| name.as_bytes().to_vec()),
            extensions: Extensions {
                backing_format: parameters.backing_format.clone(),
                luks: (self.luks_clusters > 0).then(|| LuksPointer {
                    offset: self.luks_offset().0,
                    len: parameters.encryption.map_or(0, |format| format.area_len()),
                }),
                data_file: parameters.data_file.as_deref().map(|name| {
                    // Of where it is made the image keeps nothing.
                    let name = name.strip_prefix("file:").unwrap_or(name);
                    name.as_bytes().to_vec()
                }),
                ..Extensions::default()
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(size: u64, cluster_bits: u32, preallocation: Preallocation) -> Result<Plan> {
        Plan::new(&Parameters {
            size,
            cluster_bits,
            preallocation,
            ..Parameters::default()
        })
    }

    #[test]
    fn a_small_image_has_qemus_layout() {
        let plan = plan(64 << 20, 16, Preallocation::Off).unwrap();
        assert_eq!(plan.refcount_table_offset(), HostOffset(1 << 16));
        assert_eq!(plan.refcount_block_offset(), HostOffset(2 << 16));
        assert_eq!(plan.l1_offset(), HostOffset(3 << 16));
        assert_eq!(plan.total_clusters, 4);
    }

    #[test]
    fn an_empty_disk_has_no_l1_table() {
        for preallocation in [Preallocation::Off, Preallocation::Metadata] {
            let plan = plan(0, 16, preallocation).unwrap();
            assert_eq!((plan.l1_entries, plan.total_clusters), (0, 3));
        }
    }

    #[test]
    fn every_cluster_of_a_plan_is_covered_by_its_refcount_blocks() {
        for bits in [9, 12, 16, 21] {
            for order in 0..=6 {
                for size in [0, 512, 1 << 20, 3 << 30, 100 << 30] {
                    let parameters = Parameters {
                        size,
                        cluster_bits: bits,
                        refcount_order: order,
                        ..Parameters::default()
                    };
                    for data in [false, true] {
                        let plan = Plan::with_data(&parameters, data).unwrap();
                        let geometry = plan.geometry;
                        let covered = plan.refcount_blocks * geometry.refcounts_per_block();
                        assert!(covered >= plan.total_clusters);
                        let room = plan.refcount_table_clusters * geometry.cluster_size() / 8;
                        assert!(room >= plan.refcount_blocks);
                        let end = plan.data_offset().0 + plan.at(plan.data_clusters).0;
                        assert_eq!(end, plan.end());
                    }
                }
            }
        }
    }

    #[test]
    fn a_disk_that_is_too_large_is_refused() {
        assert!(plan(128 << 30, 9, Preallocation::Off).is_ok());
        for size in [129 << 30, u64::MAX - 511, 1 << 63] {
            let error = plan(size, 9, Preallocation::Off).unwrap_err();
            assert_eq!(error.errno(), 27);
        }
        // 128 GiB of data and their metadata are more than the refcount table can describe.
        assert!(plan(128 << 30, 9, Preallocation::Full).is_err());
    }
}
