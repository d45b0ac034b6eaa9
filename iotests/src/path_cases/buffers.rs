//! Buffers of many pieces: scattered, sliced, of odd sizes, longer than a driver takes in one go. Every byte has to come
//! from, and go to, where it belongs.

use std::sync::Arc;

use block_core::{Buffer, IoBuf, IoBufMut, RequestFlags, buffer::Lent};

use crate::{
    bench::{Bench, Outcome, Probe, Stop, case, must, same, wrong},
    case::{Case, Group, Scene},
};

/// Sizes of pieces: none, tiny, around sectors and blocks.
const SIZES: [usize; 10] = [1, 511, 0, 513, 3, 4096, 7, 512, 1000, 4095];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case(
            Group::Rw,
            "rw-buffer-slices-of-one-buffer",
            "overlapping slices of one buffer can be written to different places at once",
            slices,
        ),
        case(
            Group::Rw,
            "rw-read-leaves-the-rest-of-its-buffer-alone",
            "a read into the middle of a buffer doesn't touch the bytes around it, whatever the alignment",
            rest_of_buffer,
        ),
        case(
            Group::Rw,
            "rw-buffer-of-thousands-of-pieces",
            "a request of more pieces than a driver takes in one go is carried out all the same",
            thousands,
        ),
    ];
    for alignment in [1, 4096] {
        cases.push(
            case(
                Group::Rw,
                format!("rw-vectored-requests-on-{alignment}-byte-storage"),
                format!(
                    "writes from and reads into many pieces of odd sizes, at odd offsets, move every byte to its place on \
                     storage with requests of {alignment} bytes"
                ),
                vectored,
            )
            .on_alignment(alignment),
        );
    }
    cases
}

/// `data` in pieces of odd sizes.
fn in_pieces(data: &[u8], skip: usize) -> IoBuf {
    let mut buf = IoBuf::new();
    let mut rest = data;
    for size in SIZES.iter().cycle().skip(skip) {
        let (head, tail) = rest.split_at((*size).min(rest.len()));
        buf.append(IoBuf::from(head.to_vec()));
        rest = tail;
        if rest.is_empty() {
            return buf;
        }
    }
    buf
}

/// Room for `len` bytes in pieces of odd sizes.
fn room(len: usize, skip: usize) -> Result<(Vec<Lent>, IoBufMut), Stop> {
    let mut lents = Vec::new();
    let mut buf = IoBufMut::new();
    let mut rest = len;
    for size in SIZES.iter().cycle().skip(skip) {
        let step = (*size).min(rest);
        let (lent, piece) = Buffer::try_new(step)?.lend();
        lents.push(lent);
        buf.append(piece);
        rest -= step;
        if rest == 0 {
            break;
        }
    }
    Ok((lents, buf))
}

fn collect(lents: Vec<Lent>) -> Result<Vec<u8>, Stop> {
    let mut bytes = Vec::new();
    for lent in lents {
        match lent.reclaim() {
            Ok(buffer) => bytes.extend_from_slice(&buffer),
            Err(_) => return wrong("a driver kept a part of a read buffer"),
        }
    }
    Ok(bytes)
}

async fn vectored(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let cluster = bench.cluster;
    for (skip, (offset, len)) in [
        (0, 4 * cluster),
        (1, 2 * cluster),
        (511, cluster + 513),
        (cluster - 1, 2 * cluster + 2),
        (2 * cluster + 77, 5000),
        (3 * cluster + 4095, 4098),
    ]
    .into_iter()
    .enumerate()
    {
        let data = bench.data(offset, len);
        let buf = in_pieces(&data, skip);
        bench
            .handle
            .write(offset, buf, RequestFlags::empty())
            .await?;
        bench.expect(offset, &data);
        bench.check_all("after a vectored write").await?;
        let (lents, buf) = room(len as usize + 3, skip + 3)?;
        bench
            .handle
            .readv(offset - offset.min(2), buf, RequestFlags::empty())
            .await?;
        let from = (offset - offset.min(2)) as usize;
        let expected = &bench.model[from..from + len as usize + 3];
        same(&collect(lents)?, expected, offset, "a vectored read")?;
    }
    bench.finish().await
}

async fn slices(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    let cluster = bench.cluster;
    let data = bench.data(0, cluster);
    let whole = IoBuf::from(data.clone());
    let mut running = Vec::new();
    for (at, range) in [(0, 0..4096), (1, 100..3000), (2, 2999..4096), (3, 5..6)] {
        let offset = at * cluster + 300;
        let (handle, piece) = (bench.handle.clone(), whole.slice(range.clone()));
        running.push(
            bench.start(async move { handle.write(offset, piece, RequestFlags::empty()).await }),
        );
        bench.expect(offset, &data[range]);
    }
    for write in running {
        write.await?;
    }
    bench.check_all("after all of them").await?;
    // The buffer itself is what it was.
    same(
        &whole.to_vec(),
        &data,
        0,
        "the buffer that was written from",
    )?;
    bench.finish().await
}

async fn rest_of_buffer(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let topped = bench.through(Probe::new().aligned(4096))?;
    for (offset, len) in [
        (0, 4096),
        (1, 4095),
        (511, 2),
        (4000, 9000),
        (4096, 12288),
        (8191, 1),
    ] {
        let mut buffer = Buffer::try_new(len + 200)?;
        buffer.fill(0xaa);
        let (lent, mut buf) = buffer.lend();
        drop(buf.split_to(100));
        drop(buf.split_off(len));
        bench
            .handle
            .readv(offset, buf, RequestFlags::empty())
            .await?;
        let Ok(buffer) = lent.reclaim() else {
            return wrong("a driver kept a part of a read buffer");
        };
        let around = buffer[..100].iter().chain(&buffer[100 + len..]);
        must(around.copied().all(|byte| byte == 0xaa), || {
            format!("a read at {offset:#x}+{len:#x} wrote beside its buffer")
        })?;
        let expected = &bench.model[offset as usize..offset as usize + len];
        same(&buffer[100..100 + len], expected, offset, "the read itself")?;
    }
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn thousands(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    let len = 3 * 4096;
    let data = bench.data(512, len);
    let mut buf = IoBuf::new();
    for piece in data.chunks(5) {
        buf.append(IoBuf::from(piece.to_vec()));
    }
    must(buf.segment_count() > 2000, || {
        "the pieces were put together".into()
    })?;
    bench.handle.write(512, buf, RequestFlags::empty()).await?;
    bench.expect(512, &data);
    let mut lents = Vec::new();
    let mut buf = IoBufMut::new();
    for _ in 0..len / 4 {
        let (lent, piece) = Buffer::try_new(4)?.lend();
        lents.push(lent);
        buf.append(piece);
    }
    bench.handle.readv(512, buf, RequestFlags::empty()).await?;
    same(
        &collect(lents)?,
        &data,
        512,
        "a read into thousands of pieces",
    )?;
    bench.check_all("afterwards").await?;
    bench.finish().await
}
