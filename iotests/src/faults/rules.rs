//! The rules of `blkdebug`, as options and configuration files have them, and what they become once they are read. Which
//! of them is active is the debugger's business.

use block_core::{
    DebugEvent, Error, Result,
    options::{Number, Switch},
};
use serde::Deserialize;

/// Bytes in a sector, the unit in which rules name places.
pub const SECTOR: u64 = 512;
/// EIO.
const DEFAULT_ERRNO: i32 = 5;

/// The kind of request that a rule applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoType {
    /// `read`.
    Read,
    /// `write`.
    Write,
    /// `write-zeroes`.
    WriteZeroes,
    /// `discard`.
    Discard,
    /// `flush`.
    Flush,
    /// `block-status`: only met by rules that name it.
    BlockStatus,
}

impl IoType {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "read" => Self::Read,
            "write" => Self::Write,
            "write-zeroes" => Self::WriteZeroes,
            "discard" => Self::Discard,
            "flush" => Self::Flush,
            "block-status" => Self::BlockStatus,
            _ => return None,
        })
    }
}

/// An `inject-error` rule: from its event on, matching requests fail.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InjectError {
    /// The event that makes it active; `none` for from the beginning.
    pub event: Option<String>,
    /// The state in which the event counts; 0 for any.
    pub state: Number,
    /// The kind of request; all but `block-status` when absent.
    pub iotype: Option<String>,
    /// What it fails with; EIO when absent, 0 for not at all.
    pub errno: Option<Number>,
    /// The sector that the request must touch; any when absent or negative.
    pub sector: Option<Signed>,
    /// Only one request fails.
    pub once: Switch,
    /// The request fails before anything else gets a turn.
    pub immediately: Switch,
}

/// A `set-state` rule: its event changes the state.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SetState {
    /// The event.
    pub event: Option<String>,
    /// The state in which it counts; 0 for any.
    pub state: Number,
    /// The state from then on.
    pub new_state: Number,
}

/// What an `inject-fault` rule does to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// It begins `delay-ms` later.
    Delay,
    /// Only its first `sectors` sectors are written.
    TornWrite,
    /// Bit `bit` is changed in what is read or written.
    BitFlip,
    /// Only its first `sectors` sectors are read.
    ShortRead,
}

/// An `inject-fault` rule (ours): from its event on, something happens to matching requests.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InjectFault {
    /// What happens.
    pub kind: FaultKind,
    /// As in [`InjectError`]; `none` when absent.
    #[serde(default)]
    pub event: Option<String>,
    /// As in [`InjectError`].
    #[serde(default)]
    pub state: Number,
    /// As in [`InjectError`]; when absent, all kinds that the fault can happen to.
    #[serde(default)]
    pub iotype: Option<String>,
    /// As in [`InjectError`].
    #[serde(default)]
    pub sector: Option<Signed>,
    /// As in [`InjectError`].
    #[serde(default)]
    pub once: Switch,
    /// Of a torn write or short read: what the request fails with; EIO when absent. 0: it succeeds, as if all were
    /// well; what wasn't read is zeroes.
    #[serde(default)]
    pub errno: Option<Number>,
    /// Of a torn write or short read: how many sectors are done.
    #[serde(default)]
    pub sectors: Number,
    /// Of a delay: milliseconds.
    #[serde(default, rename = "delay-ms")]
    pub delay_ms: Number,
    /// Of a bit flip: which bit, counted from the start of `sector` (of the request, where there is none); 0 is the
    /// lowest bit of the first byte.
    #[serde(default)]
    pub bit: Number,
}

/// A whole number that may be negative, and also reads a string of digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Signed(pub i64);

impl<'de> Deserialize<'de> for Signed {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let number = match &value {
            serde_json::Value::Number(number) => number.as_i64(),
            serde_json::Value::String(text) => text.parse().ok(),
            _ => None,
        };
        number
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom(format!("{value} is not a whole number")))
    }
}

/// Which requests a rule applies to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matching {
    iotype: Option<IoType>,
    sector: Option<u64>,
}

impl Matching {
    fn new(iotype: Option<&str>, sector: Option<Signed>) -> Result<Self> {
        let iotype = match iotype {
            None => None,
            Some(name) => Some(IoType::from_name(name).ok_or_else(|| bad_value("iotype", name))?),
        };
        let sector = sector.and_then(|sector| u64::try_from(sector.0).ok());
        Ok(Self { iotype, sector })
    }

    /// Whether a request over `[offset, offset + len)` is meant; `usual` tells whether a rule that names no kind means
    /// this one.
    pub fn matches(&self, io: IoType, usual: bool, offset: u64, len: u64) -> bool {
        let kind = self.iotype.map_or(usual, |iotype| iotype == io);
        let place = self.sector.is_none_or(|sector| {
            let at = sector.saturating_mul(SECTOR);
            at.saturating_add(SECTOR) > offset && at < offset.saturating_add(len)
        });
        kind && place
    }

    /// Where the sector begins within a request at `offset`, in bytes.
    pub fn place(&self, offset: u64) -> u64 {
        self.sector
            .map_or(0, |sector| (sector * SECTOR).saturating_sub(offset))
    }
}

/// What is done to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    Fail { errno: i32, immediately: bool },
    Delay { millis: u64 },
    Torn { bytes: u64, errno: i32 },
    Short { bytes: u64, errno: i32 },
    Flip { bit: u64 },
}

impl Effect {
    /// Whether a rule that names no kind of request means `io`.
    pub fn is_usual(self, io: IoType) -> bool {
        match self {
            Self::Fail { .. } | Self::Delay { .. } => io != IoType::BlockStatus,
            Self::Torn { .. } => matches!(io, IoType::Write | IoType::WriteZeroes),
            Self::Short { .. } => io == IoType::Read,
            Self::Flip { .. } => matches!(io, IoType::Read | IoType::Write),
        }
    }

    /// Whether it can happen to `io` at all.
    fn can_happen_to(self, io: IoType) -> bool {
        self.is_usual(io) || matches!(self, Self::Fail { .. } | Self::Delay { .. })
    }
}

/// A rule that acts on requests once its event has made it active.
#[derive(Debug, Clone, Copy)]
pub(super) struct Injection {
    pub matching: Matching,
    pub effect: Effect,
    pub once: bool,
}

/// What an event does.
#[derive(Debug, Clone)]
pub(super) enum Action {
    Inject(Injection),
    SetState(u64),
    Break(String),
}

/// A rule: an event, the state in which it counts, and what it does.
#[derive(Debug, Clone)]
pub(super) struct Rule {
    pub event: DebugEvent,
    pub state: u64,
    pub action: Action,
}

fn bad_value(name: &str, value: &str) -> Error {
    Error::invalid(format!("invalid parameter value: {value}")).with_field(
        name,
        value,
        "one of the names in docs/fault-injection.md",
    )
}

/// The event called `name`.
pub(super) fn event(name: &str) -> Result<DebugEvent> {
    DebugEvent::from_name(name).ok_or_else(|| bad_value("event", name))
}

fn required_event(name: Option<&str>) -> Result<DebugEvent> {
    event(name.ok_or_else(|| Error::invalid("Missing event name for rule"))?)
}

fn errno(given: Option<Number>) -> Result<i32> {
    let Some(number) = given else {
        return Ok(DEFAULT_ERRNO);
    };
    i32::try_from(number.0)
        .ok()
        .filter(|errno| *errno < 4096)
        .ok_or_else(|| {
            Error::invalid("Parameter 'errno' is out of range").with_field(
                "errno",
                number.0,
                "0 to 4095",
            )
        })
}

impl InjectError {
    pub(super) fn rule(self) -> Result<Rule> {
        let matching = Matching::new(self.iotype.as_deref(), self.sector)?;
        Ok(Rule {
            event: required_event(self.event.as_deref())?,
            state: self.state.0,
            action: Action::Inject(Injection {
                matching,
                effect: Effect::Fail {
                    errno: errno(self.errno)?,
                    immediately: self.immediately.0,
                },
                once: self.once.0,
            }),
        })
    }
}

impl SetState {
    pub(super) fn rule(self) -> Result<Rule> {
        Ok(Rule {
            event: required_event(self.event.as_deref())?,
            state: self.state.0,
            action: Action::SetState(self.new_state.0),
        })
    }
}

impl InjectFault {
    pub(super) fn rule(self) -> Result<Rule> {
        let matching = Matching::new(self.iotype.as_deref(), self.sector)?;
        let errno = errno(self.errno)?;
        let bytes = self.sectors.0.saturating_mul(SECTOR);
        let effect = match self.kind {
            FaultKind::Delay => Effect::Delay {
                millis: self.delay_ms.0,
            },
            FaultKind::TornWrite => Effect::Torn { bytes, errno },
            FaultKind::ShortRead => Effect::Short { bytes, errno },
            FaultKind::BitFlip => Effect::Flip { bit: self.bit.0 },
        };
        if let Some(io) = matching.iotype
            && !effect.can_happen_to(io)
        {
            let name = self.iotype.unwrap_or_default();
            return Err(Error::invalid(format!(
                "A fault of this kind can't happen to '{name}' requests"
            ))
            .with_field("iotype", name, "read, write or write-zeroes, as the fault"));
        }
        let event = match self.event {
            None => DebugEvent::None,
            Some(name) => event(&name)?,
        };
        Ok(Rule {
            event,
            state: self.state.0,
            action: Action::Inject(Injection {
                matching,
                effect,
                once: self.once.0,
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matching(iotype: Option<&str>, sector: Option<i64>) -> Matching {
        Matching::new(iotype, sector.map(Signed)).unwrap()
    }

    #[test]
    fn a_sector_is_met_by_requests_that_touch_it_and_by_no_others() {
        let rule = matching(None, Some(4));
        for (offset, len, hit) in [
            (2048, 512, true),
            (0, 4096, true),
            (2559, 1, true),
            (2560, 512, false),
            (0, 2048, false),
            (0, 0, false),
        ] {
            assert_eq!(
                rule.matches(IoType::Read, true, offset, len),
                hit,
                "{offset}+{len}"
            );
        }
        assert!(matching(None, Some(-1)).matches(IoType::Flush, true, 0, 0));
    }

    #[test]
    fn a_rule_without_a_kind_means_the_usual_ones_only() {
        let rule = matching(None, None);
        assert!(!rule.matches(IoType::BlockStatus, false, 0, 512));
        let rule = matching(Some("block-status"), None);
        assert!(rule.matches(IoType::BlockStatus, false, 0, 512));
        assert!(!rule.matches(IoType::Read, true, 0, 512));
    }

    #[test]
    fn a_short_read_cant_happen_to_a_write() {
        let text = r#"{"kind": "short-read", "iotype": "write"}"#;
        let fault: InjectFault = serde_json::from_str(text).unwrap();
        assert!(fault.rule().unwrap_err().reason().contains("'write'"));
    }
}
