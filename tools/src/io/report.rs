//! How qemu-io reports sizes, times and rates.

use std::{fmt::Write, time::Duration};

/// `64 KiB`, `2.639 MiB`, `17.429100 bytes`: three decimals, without trailing zeroes.
pub fn size(value: f64) -> String {
    const UNITS: [(&str, f64); 6] = [
        ("EiB", (1u64 << 60) as f64),
        ("PiB", (1u64 << 50) as f64),
        ("TiB", (1u64 << 40) as f64),
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("KiB", (1u64 << 10) as f64),
    ];
    let trim = |text: String| match text.strip_suffix(".000") {
        Some(whole) => whole.to_owned(),
        None => text,
    };
    for (unit, factor) in UNITS {
        if value >= factor {
            return format!("{} {unit}", trim(format!("{:.3}", value / factor)));
        }
    }
    if value.fract() == 0.0 {
        format!("{value:.0} bytes")
    } else {
        format!("{value:.6} bytes")
    }
}

fn time(elapsed: Duration, machine: bool) -> String {
    let total = elapsed.as_secs();
    let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
    let hundredths = elapsed.subsec_millis() / 10;
    if machine || hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}.{hundredths:02}")
    } else if minutes > 0 {
        format!("{minutes:02}:{seconds:02}.{hundredths:02}")
    } else {
        format!("{seconds:02}.{hundredths:02} sec")
    }
}

/// The two lines (or the one for machines) after a request.
pub fn request(
    what: &str,
    elapsed: Duration,
    offset: u64,
    count: u64,
    total: u64,
    operations: u32,
    machine: bool,
) -> String {
    let seconds = elapsed.as_secs_f64();
    let per_second = |value: f64| if seconds > 0.0 { value / seconds } else { 0.0 };
    let rate = per_second(total as f64);
    let ops = per_second(f64::from(operations));
    if machine {
        return format!(
            "{total},{operations},{},{rate:.3},{ops:.3}\n",
            time(elapsed, true)
        );
    }
    format!(
        "{what} {total}/{count} bytes at offset {offset}\n{}, {operations} ops; {} ({}/sec and {ops:.4} ops/sec)\n",
        size(total as f64),
        time(elapsed, false),
        size(rate),
    )
}

/// What `read -v` shows.
pub fn dump(data: &[u8], offset: u64) -> String {
    let mut text = String::new();
    for (line, bytes) in data.chunks(16).enumerate() {
        let _ = write!(text, "{:08x}:  ", offset + line as u64 * 16);
        for byte in bytes {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        for byte in bytes {
            text.push(if byte.is_ascii_graphic() {
                *byte as char
            } else {
                '.'
            });
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_like_qemu_ios() {
        assert_eq!(size(65536.0), "64 KiB");
        assert_eq!(size(32.0), "32 bytes");
        assert_eq!(size(1_507_328.0), "1.438 MiB");
        assert_eq!(size(17.4291), "17.429100 bytes");
    }

    #[test]
    fn a_request_is_two_lines_for_people_and_one_for_machines() {
        let half = Duration::from_millis(500);
        assert_eq!(
            request("wrote", half, 512, 65536, 65536, 1, false),
            "wrote 65536/65536 bytes at offset 512\n\
             64 KiB, 1 ops; 00.50 sec (128 KiB/sec and 2.0000 ops/sec)\n"
        );
        assert_eq!(
            request("read", half, 0, 4096, 4096, 1, true),
            "4096,1,0:00:00.50,8192.000,2.000\n"
        );
    }

    #[test]
    fn a_dump_has_sixteen_bytes_a_line() {
        let text = dump(b"0123456789abcdef\x00A", 0);
        assert!(text.starts_with("00000000:  30 31 32"));
        assert!(text.contains("00000010:  00 41  .A\n"), "{text}");
    }
}
