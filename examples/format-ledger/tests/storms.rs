//! Thousands of requests at once, with requests dropped and the power cut on the way: content and metadata stay whole.

use block_core::Registry;
use format_ledger::LedgerFactory;
use iotests::{
    case::FormatUnderTest,
    race::{StormConfig, storm},
};

#[test]
fn storms_leave_it_clean_with_the_gate_and_without_also_when_the_power_is_cut() {
    let registry = Registry::new().with(LedgerFactory);
    let format = FormatUnderTest::new(format_ledger::NAME)
        .with("cluster_size", 4096)
        .with_safeguards();
    for seed in 1..4 {
        let mut config = StormConfig::new(seed, 8);
        config.commands = 2000;
        let without = storm(&registry, &format, &config.clone().without_gate());
        assert!(
            without.is_clean(),
            "no gate, seed {seed}: {}",
            without.summary()
        );
        config.power_cuts = 3;
        config.drop_percent = 10;
        let with = storm(&registry, &format, &config);
        assert!(with.is_clean(), "seed {seed}: {}", with.summary());
        assert!(with.counter("gate-waits") > 0, "nobody waited");
    }
}
