//! Units of a qcow2 image, one type each, so that a guest offset can't be taken for a host offset, and the arithmetic
//! between them. Nothing here does I/O or knows what is stored where.

use std::fmt;

/// A byte of the virtual disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestOffset(pub u64);

/// A byte of the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostOffset(pub u64);

/// A cluster of the virtual disk, counted from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ClusterIndex(pub u64);

/// A cluster of the image file, counted from its start: what has a refcount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostCluster(pub u64);

impl fmt::Display for GuestOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The sizes that follow from `cluster_bits` and `refcount_order` of a header that was found valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// 9 to 21.
    cluster_bits: u32,
    /// 0 to 6.
    refcount_order: u32,
    /// Version 3 or later: the zero flag exists.
    zero_flag: bool,
    /// L2 entries take two words and tell of subclusters.
    extended_l2: bool,
    /// Guest data is in a file of its own.
    data_file: bool,
}

impl Geometry {
    /// Smallest allowed `cluster_bits`.
    pub const MIN_CLUSTER_BITS: u32 = 9;
    /// Largest allowed `cluster_bits`.
    pub const MAX_CLUSTER_BITS: u32 = 21;
    /// Smallest allowed `cluster_bits` with extended L2 entries.
    pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
    /// Subclusters of a cluster with an extended L2 entry.
    pub const SUBCLUSTERS: u64 = 32;
    /// Largest allowed `refcount_order`.
    pub const MAX_REFCOUNT_ORDER: u32 = 6;

    /// `None` when a value is outside the range that the format allows. `version` is 2 or 3.
    pub const fn new(cluster_bits: u32, refcount_order: u32, version: u32) -> Option<Self> {
        if cluster_bits < Self::MIN_CLUSTER_BITS
            || cluster_bits > Self::MAX_CLUSTER_BITS
            || refcount_order > Self::MAX_REFCOUNT_ORDER
            || (version == 2 && refcount_order != 4)
            || version < 2
        {
            return None;
        }
        Some(Self {
            cluster_bits,
            refcount_order,
            zero_flag: version >= 3,
            extended_l2: false,
            data_file: false,
        })
    }

    /// The same with extended L2 entries (digest, section 3.1). `None` when the format doesn't allow them: they need
    /// version 3 and clusters of at least 16 KiB.
    pub const fn with_extended_l2(self) -> Option<Self> {
        if !self.zero_flag || self.cluster_bits < Self::MIN_EXTENDED_CLUSTER_BITS {
            return None;
        }
        Some(Self {
            extended_l2: true,
            ..self
        })
    }

    /// The same for an image whose guest data is (or isn't) in an external data file.
    #[must_use]
    pub const fn with_data_file(self, data_file: bool) -> Self {
        Self { data_file, ..self }
    }

    /// Whether guest data is in an external data file: a host offset in a standard L2 entry is then an offset in that file and
    /// equal to the guest's, and data clusters have no refcounts.
    pub const fn has_data_file(self) -> bool {
        self.data_file
    }

    /// log2 of the cluster size.
    pub const fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have a zero flag (version 3).
    pub const fn has_zero_flag(self) -> bool {
        self.zero_flag
    }

    /// Whether L2 entries are extended.
    pub const fn has_extended_l2(self) -> bool {
        self.extended_l2
    }

    /// log2 of what an L2 entry tells apart: a subcluster, or the cluster where L2 entries aren't extended.
    pub const fn subcluster_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 5 } else { 0 }
    }

    /// Bytes of a subcluster; of a cluster where L2 entries aren't extended.
    pub const fn subcluster_size(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// log2 of the bytes of an L2 entry.
    pub const fn l2_entry_bits(self) -> u32 {
        3 + self.extended_l2 as u32
    }

    /// Bytes of an L2 entry.
    pub const fn l2_entry_size(self) -> u64 {
        1 << self.l2_entry_bits()
    }

    /// log2 of the bits in a refcount.
    pub const fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Bits in a refcount.
    pub const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount that can be stored.
    pub const fn refcount_max(self) -> u64 {
        if self.refcount_order == 6 {
            u64::MAX
        } else {
            (1 << self.refcount_bits()) - 1
        }
    }

    /// Refcounts in one refcount block.
    pub const fn refcounts_per_block(self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// log2 of the refcounts in one block.
    pub const fn refcount_block_bits(self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// log2 of the entries in an L2 table.
    pub const fn l2_bits(self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// Entries in an L2 table.
    pub const fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Bytes of the virtual disk that one L2 table covers.
    pub const fn l2_coverage(self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// Entries that an L1 table needs for a disk of `size` bytes.
    pub const fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Clusters that `bytes` need.
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// The guest cluster that `offset` is in.
    pub const fn cluster_of(self, offset: GuestOffset) -> ClusterIndex {
        ClusterIndex(offset.0 >> self.cluster_bits)
    }

    /// Where a guest cluster begins.
    pub const fn cluster_start(self, cluster: ClusterIndex) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// The offset within its cluster.
    pub const fn within(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The L1 entry that covers a guest cluster.
    pub const fn l1_index(self, cluster: ClusterIndex) -> u64 {
        cluster.0 >> self.l2_bits()
    }

    /// The entry of a guest cluster in its L2 table.
    pub const fn l2_index(self, cluster: ClusterIndex) -> u64 {
        cluster.0 & (self.l2_entries() - 1)
    }

    /// The host cluster that `offset` is in.
    pub const fn host_cluster_of(self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// Where a host cluster begins.
    pub const fn host_start(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Whether a host offset is where a cluster begins.
    pub const fn is_aligned(self, offset: HostOffset) -> bool {
        self.within(offset.0) == 0
    }

    /// The refcount table entry for a host cluster.
    pub const fn refcount_table_index(self, cluster: HostCluster) -> u64 {
        cluster.0 >> self.refcount_block_bits()
    }

    /// The place of a host cluster's refcount in its block.
    pub const fn refcount_block_index(self, cluster: HostCluster) -> u64 {
        cluster.0 & (self.refcounts_per_block() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_geometry_has_the_sizes_of_the_specification() {
        let geometry = Geometry::new(16, 4, 3).unwrap();
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.l2_coverage(), 512 << 20);
        assert_eq!(geometry.refcounts_per_block(), 32768);
        assert_eq!(geometry.refcount_max(), 65535);
        assert_eq!(geometry.l1_entries_for(64 << 20), 1);
        assert_eq!(geometry.l1_entries_for((512 << 20) + 1), 2);
    }

    #[test]
    fn an_extended_geometry_has_half_the_entries_and_32_subclusters() {
        let geometry = Geometry::new(16, 4, 3).unwrap().with_extended_l2().unwrap();
        assert_eq!(geometry.l2_entry_size(), 16);
        assert_eq!(geometry.l2_entries(), 4096);
        assert_eq!(geometry.l2_coverage(), 256 << 20);
        assert_eq!(geometry.subcluster_size(), 2048);
        let ordinary = Geometry::new(16, 4, 3).unwrap();
        assert_eq!(ordinary.subcluster_size(), ordinary.cluster_size());
        for (bits, version, allowed) in [(13, 3, false), (14, 3, true), (16, 2, false)] {
            let geometry = Geometry::new(bits, 4, version).unwrap();
            assert_eq!(geometry.with_extended_l2().is_some(), allowed);
        }
    }

    #[test]
    fn what_the_format_forbids_is_refused() {
        assert!(Geometry::new(8, 4, 3).is_none());
        assert!(Geometry::new(22, 4, 3).is_none());
        assert!(Geometry::new(16, 7, 3).is_none());
        assert!(Geometry::new(16, 3, 2).is_none());
        assert_eq!(Geometry::new(21, 6, 3).unwrap().refcount_max(), u64::MAX);
        assert_eq!(Geometry::new(9, 0, 3).unwrap().refcounts_per_block(), 4096);
    }
}
