//! Numbers of bytes: reading them from arguments with qemu's messages, and writing them for people.

use block_core::{ErrorKind, options::parse_size};

use super::failure::Failure;

/// The largest image that qemu's tools know.
pub const MAX_SIZE: u64 = i64::MAX as u64;

/// Reads a number (with an optional suffix) between `min` and `max`; `what` names it in messages.
pub fn parse_number(what: &str, text: &str, min: u64, max: u64) -> Result<u64, Failure> {
    let range = || {
        Failure::new(format!(
            "Invalid {what} specified. Must be between {min} and {max}."
        ))
    };
    let digits = text.strip_prefix('-');
    match parse_size(digits.unwrap_or(text)) {
        Ok(value) if digits.is_some() && value != 0 => Err(range()),
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        Ok(_) => Err(range()),
        Err(error) if error.kind() == ErrorKind::TooBig => Err(range()),
        Err(_) if is_digits(digits.unwrap_or(text)) => Err(range()),
        Err(_) => Err(Failure::new(format!("Invalid {what} specified: '{text}'."))),
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A size for people, as qemu's tools print it: three significant digits and the unit.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >= 1000u64 << (10 * unit) {
        unit += 1;
    }
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// `%.3g`.
fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{value:.2e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |text: &str| -> String {
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            text.to_owned()
        }
    };
    if (-4..3).contains(&exponent) {
        trim(&format!(
            "{value:.*}",
            usize::try_from(2 - exponent).unwrap_or(0)
        ))
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{}e{sign}{:02}", trim(mantissa), exponent.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by qemu-img 10.0.2.
    #[test]
    fn sizes_for_people_are_qemus() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10240, "10 KiB"),
            (1_047_552, "0.999 MiB"),
            (1_048_064, "1 MiB"),
            (1_023_488, "1e+03 KiB"),
            (1_022_976, "999 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_029_120, "0.981 MiB"),
            (12_345_344, "11.8 MiB"),
            (123_456_512, "118 MiB"),
            (1_234_567_680, "1.15 GiB"),
            (1 << 40, "1 TiB"),
            (197_120, "192 KiB"),
            (1_507_328, "1.44 MiB"),
        ] {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
        assert_eq!(human_size(u64::MAX), "16 EiB");
    }

    #[test]
    fn numbers_are_refused_with_qemus_words() {
        let error = |text| {
            format!(
                "{:?}",
                parse_number("image size", text, 0, MAX_SIZE).unwrap_err()
            )
        };
        assert!(error("1Q").contains("Invalid image size specified: '1Q'."));
        let range = "Invalid image size specified. Must be between 0 and 9223372036854775807.";
        for text in ["-1", "9E", "100000000000000000000", "16E"] {
            assert!(error(text).contains(range), "{text}");
        }
        assert_eq!(
            parse_number("image size", "1.5G", 0, MAX_SIZE).unwrap(),
            3 << 29
        );
        assert_eq!(
            parse_number("image size", "0x100000", 0, MAX_SIZE).unwrap(),
            1 << 20
        );
    }
}
