//! How large an image gets (`measure`). Arithmetic over the plan of a new image; no I/O.

use block_core::{driver::Preallocation, error::Result, options::Options, registry::Measure};

use crypto::EncryptionFormat;

use crate::create::{Parameters, Plan, plan::too_large};

/// Options that don't change how large an image gets.
const WITHOUT_EFFECT: [&str; 6] = [
    "backing_file",
    "backing_fmt",
    "compression_type",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
];

/// Bytes that an image of `size` virtual bytes with these create options needs, if data is at `data` (offset and
/// length in bytes; ascending, disjoint).
///
/// As in `qemu-img measure`, both numbers count all L2 tables, allocated or not, and what goes to an external data file
/// counts as well. Options that don't matter for the size aren't looked at. What over a backing file has to read as zeroes
/// is data to an image of version 2: there it belongs into `data`.
pub fn measure(size: u64, data: &[(u64, u64)], mut options: Options) -> Result<Measure> {
    for name in WITHOUT_EFFECT {
        options.take(name);
    }
    let parameters = Parameters::for_size(size, options)?;
    if matches!(parameters.encryption, Some(EncryptionFormat::Luks(_)))
        && parameters.key_secret.is_none()
    {
        return Err(crypto::options::missing_key());
    }
    let plan = Plan::with_data(&parameters, true).ok_or_else(|| {
        too_large(
            "The image size is too large (try using a larger cluster size)",
            &parameters,
        )
    })?;
    let geometry = plan.geometry;
    let fully_allocated = plan.end();
    let required = match parameters.preallocation {
        Preallocation::Falloc | Preallocation::Full => fully_allocated,
        Preallocation::Off | Preallocation::Metadata => {
            let mut clusters = 0;
            let mut counted = 0;
            for &(offset, len) in data {
                let first = (offset >> geometry.cluster_bits()).max(counted);
                let end = geometry.clusters_for(offset.saturating_add(len).min(parameters.size));
                clusters += end.saturating_sub(first);
                counted = counted.max(end);
            }
            fully_allocated - (plan.data_clusters - clusters) * geometry.cluster_size()
        }
    };
    Ok(Measure {
        required,
        fully_allocated,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers printed by qemu-img 10.0.2.
    #[test]
    fn the_numbers_are_those_of_qemu_img() {
        for (options, size, required, fully_allocated) in [
            ("", 0, 196_608, 196_608),
            ("", 512, 327_680, 393_216),
            ("", 1 << 40, 168_034_304, 1_099_679_662_080),
            ("", 60 << 40, 10_067_968_000, 65_980_765_634_560),
            ("cluster_size=512", 512, 2_560, 3_072),
            ("cluster_size=512", 1 << 30, 21_385_216, 1_095_127_040),
            (
                "refcount_bits=1",
                60 << 40,
                8_180_072_448,
                65_978_877_739_008,
            ),
            ("refcount_bits=64", 1 << 30, 524_288, 1_074_266_112),
            (
                "cluster_size=4096,refcount_bits=64",
                1 << 40,
                4_311_805_952,
                1_103_823_433_728,
            ),
            ("preallocation=full", 1 << 30, 1_074_135_040, 1_074_135_040),
        ] {
            let options = Options::from_dotted(options).unwrap();
            let expected = Measure {
                required,
                fully_allocated,
            };
            assert_eq!(measure(size, &[], options).unwrap(), expected, "{size}");
        }
    }

    #[test]
    fn each_cluster_with_data_counts_once() {
        let required =
            |data: &[(u64, u64)]| measure(1 << 20, data, Options::new()).unwrap().required;
        let empty = required(&[]);
        assert_eq!(required(&[(0, 1)]), empty + 65536);
        assert_eq!(required(&[(0, 1), (100, 1), (65535, 1)]), empty + 65536);
        assert_eq!(required(&[(65535, 2)]), empty + 2 * 65536);
        assert_eq!(required(&[(0, 1), (65535, 65538)]), empty + 3 * 65536);
    }

    #[test]
    fn a_disk_that_is_too_large_is_refused() {
        let options = Options::new().with("cluster_size", 512);
        let error = measure(1 << 40, &[], options).unwrap_err();
        assert_eq!(
            error.reason(),
            "The image size is too large (try using a larger cluster size)"
        );
    }
}
