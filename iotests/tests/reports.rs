//! What comes of cases that fail or prove nothing: statuses, lines, and the command.

use std::sync::Arc;

use block_core::Registry;
use iotests::{
    case::{Case, CaseResult, FormatUnderTest, Group, Scene, Verdict, run},
    memdriver::{self, ThirdPartyFactory},
    report::{self, Report},
    runner::{Plan, run_all, status},
};
use parking_lot::Mutex;

fn registry() -> Registry {
    Registry::new().with(ThirdPartyFactory)
}

fn format() -> FormatUnderTest {
    FormatUnderTest::new(memdriver::NAME)
}

fn case(name: &str, verdict: Verdict) -> Case {
    Case::new(Group::Rw, name, "a sentence", move |_| {
        let verdict = verdict.clone();
        async move { Ok(verdict) }
    })
}

fn report_of(cases: &[Case], seeds: std::ops::Range<u64>) -> Report {
    let formats = [format()];
    let mut heard = 0;
    let outcomes = run_all(
        &registry(),
        &formats,
        cases,
        &Plan::new(seeds.clone()),
        |format, case, seed| format!("again {} {} {seed}", format.name, case.name),
        |done, _| heard = done,
    );
    assert_eq!(heard, cases.len(), "progress hears of each");
    Report {
        formats: formats.iter().map(FormatUnderTest::label).collect(),
        seeds,
        notes: Vec::new(),
        outcomes,
    }
}

fn status_of(report: &Report) -> u8 {
    status(report.outcomes.iter().map(|outcome| &outcome.verdict))
}

#[test]
fn a_failure_weighs_more_than_what_proved_nothing_and_that_more_than_what_passed() {
    let passed = case("passed", Verdict::Passed);
    let skipped = case("skipped", Verdict::NotCovered("no such thing".into()));
    let idle = case("idle", Verdict::Inconclusive("nothing happened".into()));
    let failed = case("failed", Verdict::Failed("wrong".into()));
    assert_eq!(
        status_of(&report_of(&[passed.clone(), skipped.clone()], 0..1)),
        0
    );
    assert_eq!(
        status_of(&report_of(&[passed.clone(), idle.clone()], 0..1)),
        2
    );
    let all = report_of(&[failed, idle, skipped, passed], 0..1);
    assert_eq!(status_of(&all), 1);
    let matrix = report::matrix(&all);
    for (name, mark) in [
        ("failed", "F"),
        ("idle", "?"),
        ("skipped", "-"),
        ("passed", "p"),
    ] {
        let row = matrix
            .lines()
            .find(|line| line.trim_start().starts_with(&format!("{name} ")));
        let row = row.unwrap_or_else(|| panic!("no row {name}:\n{matrix}"));
        assert!(row.ends_with(mark), "{row}");
    }
    assert!(report::summary(&all).contains("again: again thirdparty failed 0"));
}

#[test]
fn the_command_names_the_schedule_under_which_it_failed() {
    let runs = Arc::new(Mutex::new(0));
    let counted = runs.clone();
    let third = Case::new(Group::Rw, "third-time", "a sentence", move |_| {
        let mut runs = counted.lock();
        *runs += 1;
        let wrong = *runs == 3;
        async move {
            if wrong {
                return Err("the third time".into());
            }
            Ok(Verdict::Passed)
        }
    });
    let report = report_of(&[third], 10..20);
    assert_eq!(report.outcomes[0].seed, 12);
    assert_eq!(report.outcomes[0].again, "again thirdparty third-time 12");
    assert_eq!(*runs.lock(), 3, "no schedule after the one that failed");
}

#[test]
fn a_panic_fails_the_case_with_its_place_and_stops_nobody_else() {
    let panics = Case::new(Group::Rw, "panics", "a sentence", |_| async {
        panic!("on purpose")
    });
    let report = report_of(&[panics, case("passed", Verdict::Passed)], 0..2);
    let text = report.outcomes[0].verdict.detail();
    assert!(
        text.contains("on purpose") && text.contains("reports.rs:"),
        "{text}"
    );
    assert_eq!(report.outcomes[1].verdict, Verdict::Passed);
}

async fn fill(scene: Arc<Scene>) -> Result<Arc<block_core::Node>, iotests::case::Failure> {
    let format = &scene.format;
    let lab = &scene.lab;
    lab.create(&format.name, "image", 1 << 20, &format.create, None)
        .await?;
    let node = lab
        .open(&format.name, "image", None, &block_core::Options::new())
        .await?;
    let handle = lab.attach(&node, "guest")?;
    handle
        .write(0, vec![7u8; 4096], block_core::RequestFlags::empty())
        .await?;
    handle.flush().await?;
    Ok(node)
}

fn verdict_of<F>(run_it: impl Fn(Arc<Scene>) -> F + Send + Sync + 'static) -> Verdict
where
    F: Future<Output = CaseResult> + Send + 'static,
{
    let case = Case::new(Group::Rw, "looked-at", "a sentence", run_it);
    run(&registry(), &format(), &case, 0, None).verdict
}

#[test]
fn a_node_that_survives_its_world_is_a_leak_and_fails_the_case() {
    static KEPT: Mutex<Option<Arc<block_core::Node>>> = Mutex::new(None);
    let verdict = verdict_of(|scene| async {
        *KEPT.lock() = Some(fill(scene).await?);
        Ok(Verdict::Passed)
    });
    KEPT.lock().take();
    assert!(
        matches!(&verdict, Verdict::Failed(text) if text.contains("still in memory")),
        "{verdict:?}"
    );
}

#[test]
fn an_image_that_a_case_leaves_damaged_fails_it_unless_it_says_that_this_is_on_purpose() {
    for on_purpose in [false, true] {
        let verdict = verdict_of(move |scene| async move {
            fill(scene.clone()).await?;
            scene.lab.graph.close_all().await?;
            let disk = scene.lab.disk("image")?;
            let mut content = disk.content();
            // The table's first entry points far behind the end of the file.
            content.write(512, &(1u64 << 40).to_le_bytes());
            disk.restore(content);
            if on_purpose {
                scene.leaves_damage();
            }
            Ok(Verdict::Passed)
        });
        assert_eq!(verdict.is_failed(), !on_purpose, "{verdict:?}");
    }
}
