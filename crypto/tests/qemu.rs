//! LUKS files that are made here are opened, read and written by qemu, for every cipher, mode, IV generator and hash that
//! it has.

use std::{
    path::Path,
    process::{Command, Output},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use block_core::{env::Environment, error::Result, secret::Secret};
use crypto::{
    cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenAlgorithm},
    hash::HashAlgorithm,
    luks::{self, Area, CreateParameters, LuksHeader},
};
use env_tokio::EnvTokio;
use futures::executor::block_on;

struct Memory(Mutex<Vec<u8>>);

#[async_trait]
impl Area for Memory {
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        Ok(self.0.lock().unwrap()[offset as usize..offset as usize + len].to_vec())
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<()> {
        self.0.lock().unwrap()[offset as usize..offset as usize + data.len()]
            .copy_from_slice(&data);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

fn qemu_io(path: &Path, commands: &[&str]) -> Option<Output> {
    let image = format!("driver=luks,key-secret=s,file.filename={}", path.display());
    let mut qemu = Command::new("qemu-io");
    qemu.args([
        "--object",
        "secret,id=s,data=letmein",
        "--image-opts",
        &image,
    ]);
    for command in commands {
        qemu.args(["-c", command]);
    }
    match qemu.output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("SKIPPED: qemu-io can't be run: {error}");
            None
        }
    }
}

fn specs() -> Vec<(CipherSpec, HashAlgorithm)> {
    let mut all = Vec::new();
    let mut hashes = HashAlgorithm::ALL.into_iter().cycle();
    for algorithm in CipherAlgorithm::ALL {
        for mode in CipherMode::ALL {
            for (ivgen, ivgen_hash) in [
                (IvGenAlgorithm::Plain, None),
                (IvGenAlgorithm::Plain64, Some(HashAlgorithm::Sha1)),
                (IvGenAlgorithm::Essiv, Some(HashAlgorithm::Sha256)),
                (IvGenAlgorithm::Essiv, Some(HashAlgorithm::Md5)),
            ] {
                let spec = CipherSpec {
                    algorithm,
                    mode,
                    ivgen,
                    ivgen_hash,
                };
                let parameters = CreateParameters {
                    spec,
                    ..CreateParameters::default()
                };
                if parameters.check().is_ok() {
                    all.extend(hashes.next().map(|hash| (spec, hash)));
                }
            }
        }
    }
    all
}

#[test]
fn qemu_reads_and_writes_what_every_cipher_here_makes() {
    let dir = std::env::temp_dir().join(format!("crypto-qemu-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let env: Arc<dyn Environment> = Arc::new(EnvTokio::new(1).unwrap());
    let password = Secret::new("letmein");
    let specs = specs();
    assert!(specs.len() > 90, "{}", specs.len());
    for (number, (spec, hash)) in specs.into_iter().enumerate() {
        let path = dir.join(format!("{number}.luks"));
        let what = format!(
            "{} {} {}",
            spec.algorithm.name(),
            spec.mode_text(),
            hash.name()
        );
        let parameters = CreateParameters {
            spec,
            hash,
            iter_time: 1,
        };
        let (header, master, steps) = block_on(luks::create(&env, &parameters, &password)).unwrap();
        let area = Memory(Mutex::new(vec![0; header.area_len() as usize]));
        block_on(luks::run(&env, &area, steps)).unwrap();
        let mut content: Vec<u8> = (0..8192u32).map(|n| (n * 7 / 5) as u8).collect();
        content[..4096].fill(0xa5);
        let crypto = master.crypto(&header).unwrap();
        crypto.encrypt(0, &mut content);
        let mut file = area.0.into_inner().unwrap();
        file.extend(&content);
        std::fs::write(&path, &file).unwrap();
        let commands = ["read -P 0xa5 0 4096", "write -P 0x3c 2048 4096"];
        let Some(output) = qemu_io(&path, &commands) else {
            return;
        };
        let said = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && !said.contains("failed"),
            "{what}: {said}"
        );

        let file = std::fs::read(&path).unwrap();
        let back = LuksHeader::decode(&file).unwrap();
        assert_eq!(back, header, "{what}");
        let payload = file[back.area_len() as usize..].to_vec();
        let (slot, key) = block_on(luks::unlock(
            &env,
            &back,
            &Memory(Mutex::new(file)),
            &password,
        ))
        .unwrap();
        assert_eq!(slot, 0);
        let mut plain = payload;
        key.crypto(&back).unwrap().decrypt(0, &mut plain);
        assert!(plain[..2048].iter().all(|byte| *byte == 0xa5), "{what}");
        assert!(plain[2048..6144].iter().all(|byte| *byte == 0x3c), "{what}");
        assert_eq!(plain[6144], (6144 * 7 / 5) as u8, "{what}");
        std::fs::remove_file(&path).unwrap();
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
