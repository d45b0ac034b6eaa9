//! The storm on qcow2: {gate on, off} × {the driver's own safeguards on, off}, regions of 8, 16 and 32 clusters, 8 seeds
//! each, 5,000 commands each.

use block_core::Registry;
use format_qcow2::Qcow2Factory;
use iotests::{
    case::{FormatUnderTest, Verdict},
    race::{Cell, Expect, Matrix, StormConfig, StormReport, storm},
};

const REGIONS: [u64; 3] = [8, 16, 32];

fn registry() -> Registry {
    Registry::new().with(Qcow2Factory::default())
}

fn without_safeguards() -> Registry {
    Registry::new().with(Qcow2Factory::without_safeguards_for_tests())
}

fn format() -> FormatUnderTest {
    FormatUnderTest::new("qcow2")
        .with("cluster_size", "4k")
        .with_safeguards()
}

fn runs(registry: &Registry, gate: bool, safeguards: bool, expect: Expect) -> Vec<Cell> {
    let what = Matrix::default();
    REGIONS
        .into_iter()
        .map(|region| {
            let runs: Vec<StormReport> = what
                .seeds
                .clone()
                .map(|seed| {
                    let config = StormConfig {
                        gate,
                        ask_qemu: expect != Expect::Corrupt,
                        ..StormConfig::new(seed, region)
                    };
                    storm(registry, &format(), &config)
                })
                .collect();
            let cell = Cell {
                gate,
                safeguards,
                region,
                expect,
                runs,
            };
            println!(
                "gate {gate}, safeguards {safeguards}, region {region}: corrupt in {} of {}, waits {}, deferred \
                 {}, caught {}: {:?}",
                cell.corrupt_runs(),
                cell.runs.len(),
                cell.total("gate-waits"),
                cell.total("frees-deferred-by-pins"),
                cell.total("ownership-violations-caught"),
                cell.verdict()
            );
            cell
        })
        .collect()
}

#[test]
fn gate_and_safeguards_leave_every_image_clean() {
    for cell in runs(&registry(), true, true, Expect::Clean) {
        assert_eq!(cell.verdict(), Verdict::Passed, "region {}", cell.region);
    }
}

#[test]
fn safeguards_alone_never_let_another_range_be_touched_and_count_what_they_caught() {
    for cell in runs(&registry(), false, true, Expect::OthersIntact) {
        assert_eq!(cell.verdict(), Verdict::Passed, "region {}", cell.region);
    }
}

#[test]
fn without_gate_and_safeguards_corruption_is_detected_in_8_of_8_runs() {
    for cell in runs(&without_safeguards(), false, false, Expect::Corrupt) {
        assert_eq!(
            cell.corrupt_runs(),
            8,
            "region {}: {:?}",
            cell.region,
            cell.verdict()
        );
    }
}
