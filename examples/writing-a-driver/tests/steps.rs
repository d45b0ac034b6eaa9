use block_core::{DriverFactory, Registry};
use iotests::{case::*, cli::all_cases};
fn show(name: &str, f: impl DriverFactory, opts: &[(&str, u64)], safe: bool) {
    let registry = Registry::new().with(f);
    let mut format = FormatUnderTest::new(name);
    for (k, v) in opts {
        format = format.with(k, *v);
    }
    format.safeguards = safe;
    for case in all_cases() {
        if case.group == Group::Cancel {
            continue;
        }
        for seed in 0..2 {
            let v = run(&registry, &format, &case, seed, None).verdict;
            if v != Verdict::Passed || seed == 1 {
                println!(
                    "{name} {} {} {}",
                    case.name,
                    v.word(),
                    v.detail().replace('\n', " ")
                );
                break;
            }
        }
    }
}
#[test]
fn one() {
    show("step1", writing_a_driver::step1::Factory, &[], false);
}
