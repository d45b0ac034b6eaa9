//! Encrypted images: the key that an image was opened with, and guest data on its way between plain and encrypted.
//!
//! Only standard clusters are encrypted, in sectors of 512 bytes; compressed ones and metadata never are. The IV of a sector is
//! made of its place in the file that holds the data (LUKS), or of its place on the disk (legacy AES). Encryption goes
//! through a buffer of its own: guest memory never holds what it shouldn't. The cryptography itself is in the crate
//! `crypto`.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    buffer::{Buffer, IoBuf, IoBufMut},
    env::{Environment, offload},
    error::{Error, Result},
    flags::RequestFlags,
    options::Options,
    registry::OpenContext,
    request::{Child, Request},
    secret::Secrets,
};
use crypto::{
    SectorCrypto, legacy_aes,
    luks::{self, Area, HEADER_LEN, LuksHeader, MasterKey, SlotChange},
    options::{missing_key, take_number},
    passphrase,
};
use futures::lock::Mutex;
use serde_json::{Value, json};

use crate::{
    image::Qcow2,
    io::read::read_host,
    layout::{Header, HostOffset, extensions::LuksPointer},
};

/// From how many bytes on a request's cryptography is done by the environment's workers.
const OFFLOADED: usize = 64 << 10;
/// Bytes that are encrypted and written at once.
const PIECE: usize = 1 << 20;

/// An encrypted image's key and how it is used.
pub(crate) struct Encryption {
    /// `None` when the image was opened without its key, for what needs none.
    key: Option<Arc<SectorCrypto>>,
    /// IVs are made of guest offsets, not of host offsets.
    by_guest: bool,
    luks: Option<Luks>,
    /// The user has said that compressed clusters may be stored unencrypted, which is the only way there is.
    compressed_plaintext: bool,
    /// Where passwords of changes are looked up.
    secrets: Arc<Secrets>,
}

struct Luks {
    pointer: LuksPointer,
    /// The header as it is on disk. Held over a change of key slots.
    header: Mutex<LuksHeader>,
    master: Option<MasterKey>,
}

/// The LUKS header and its key material in the image file.
pub(crate) struct FileArea<'a> {
    pub file: &'a Child,
    pub pointer: LuksPointer,
}

impl FileArea<'_> {
    fn at(&self, offset: u64, len: usize) -> Result<u64> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|end| end > self.pointer.len) {
            return Err(
                Error::invalid("LUKS header area is too small for what it holds").with_field(
                    "LUKS header length",
                    self.pointer.len,
                    format!("at least {offset} + {len}"),
                ),
            );
        }
        Ok(self.pointer.offset + offset)
    }
}

#[async_trait]
impl Area for FileArea<'_> {
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let at = self.at(offset, len)?;
        Ok(self.file.read_padded(at, len).await?.to_vec())
    }

    async fn write(&self, offset: u64, data: Vec<u8>) -> Result<()> {
        let at = self.at(offset, data.len())?;
        self.file.write(at, data, RequestFlags::empty()).await
    }

    async fn flush(&self) -> Result<()> {
        self.file.flush().await
    }
}

/// The encryption method's name in options; `None` for plain images.
fn method_name(header: &Header) -> Option<&'static str> {
    match header.crypt_method {
        0 => None,
        1 => Some("aes"),
        _ => Some("luks"),
    }
}

/// What the option `encrypt` says, besides the method.
#[derive(Default)]
struct EncryptOptions {
    /// The id of the secret.
    secret: Option<String>,
    compressed_plaintext: bool,
}

fn parse(options: &mut Options, header: &Header) -> Result<EncryptOptions> {
    let mut encrypt = match options.take("encrypt") {
        None | Some(Value::Null) => return Ok(EncryptOptions::default()),
        Some(Value::Object(map)) => Options(map),
        Some(_) => return Err(Error::invalid("Parameter 'encrypt' expects an object")),
    };
    let format = encrypt.take_str("format")?;
    match (method_name(header), format) {
        (None, Some(format)) => {
            return Err(Error::invalid(format!(
                "No encryption in image header, but options specified format '{format}'"
            ))
            .with_field("encrypt.format", format, "nothing"));
        }
        (Some(method), Some(format)) if method != format => {
            return Err(Error::invalid(format!(
                "Header reported '{method}' encryption format but options specify '{format}'"
            ))
            .with_field("encrypt.format", format, method));
        }
        _ => {}
    }
    let secret = encrypt.take_str("key-secret")?;
    let compressed_plaintext = encrypt.take_switch("compressed-plaintext")?;
    if header.crypt_method != 0
        && let Some(key) = encrypt.0.keys().next()
    {
        return Err(Error::invalid(format!("Parameter '{key}' is unexpected")));
    }
    Ok(EncryptOptions {
        secret,
        compressed_plaintext: compressed_plaintext.unwrap_or(false),
    })
}

/// Reads the LUKS header that an image points to.
pub(crate) async fn read_luks(file: &Child, pointer: LuksPointer) -> Result<LuksHeader> {
    let area = FileArea { file, pointer };
    let luks = LuksHeader::decode(&area.read(0, HEADER_LEN).await?)?;
    // The payload offset itself means nothing here, but key material ends before it.
    for slot in 0..luks::SLOTS {
        area.at(luks.material_offset(slot), luks.material_len())?;
    }
    Ok(luks)
}

impl Encryption {
    /// Looks at how an image is encrypted and finds its key; takes the option `encrypt` out. `None` for plain images.
    ///
    /// # Errors
    /// EINVAL when there is no key, unless the image is opened for what needs none; EPERM for the wrong one.
    pub async fn open(
        context: &OpenContext,
        options: &mut Options,
        header: &Header,
        file: &Child,
    ) -> Result<Option<Self>> {
        let EncryptOptions {
            secret: id,
            compressed_plaintext,
        } = parse(options, header)?;
        if header.crypt_method == 0 {
            return Ok(None);
        }
        let graph = context.graph();
        let secrets = graph.secrets().clone();
        let needless = context.how.metadata_only || context.how.for_check && id.is_none();
        let password = if needless {
            None
        } else {
            Some(passphrase(&secrets, id.as_deref())?)
        };
        let Some(pointer) = header.extensions.luks.filter(|_| header.crypt_method == 2) else {
            let key = password.map(|password| legacy_aes(password.expose()));
            return Ok(Some(Self {
                key: key.transpose()?.map(Arc::new),
                by_guest: true,
                luks: None,
                compressed_plaintext,
                secrets,
            }));
        };
        let luks = read_luks(file, pointer).await?;
        let master = match &password {
            Some(password) => {
                let area = FileArea { file, pointer };
                Some(luks::unlock(graph.env(), &luks, &area, password).await?.1)
            }
            None => None,
        };
        let key = master.as_ref().map(|master| master.crypto(&luks));
        Ok(Some(Self {
            key: key.transpose()?.map(Arc::new),
            by_guest: false,
            luks: Some(Luks {
                pointer,
                header: Mutex::new(luks),
                master,
            }),
            compressed_plaintext,
            secrets,
        }))
    }

    fn key(&self) -> Result<&Arc<SectorCrypto>> {
        self.key
            .as_ref()
            .ok_or_else(|| Error::io("Parameter 'encrypt.key-secret' is required for cipher"))
    }

    fn sector(&self, guest: u64, host: HostOffset) -> u64 {
        (if self.by_guest { guest } else { host.0 }) / crypto::SECTOR_SIZE as u64
    }

    /// Whether compressed data may be written, which is stored unencrypted.
    pub const fn allows_compressed_plaintext(&self) -> bool {
        self.compressed_plaintext
    }

    /// The part of `format-specific` information that is about encryption.
    pub async fn info(&self) -> Value {
        match &self.luks {
            None => json!({ "format": "aes" }),
            Some(luks) => luks.header.lock().await.info(),
        }
    }
}

/// What a change of key slots takes: the options below `encrypt`.
fn slot_change(mut options: Options, force: bool, secrets: &Secrets) -> Result<SlotChange> {
    const KNOWN: [&str; 5] = ["state", "new-secret", "old-secret", "keyslot", "iter-time"];
    if let Some(key) = options.0.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(Error::invalid(format!("Invalid parameter 'encrypt.{key}'")));
    }
    let Some(state) = options.take_str("state")? else {
        return Err(Error::invalid("Parameter 'state' is missing").with_field(
            "encrypt.state",
            "missing",
            "active, inactive",
        ));
    };
    let activate = match state.as_str() {
        "active" => true,
        "inactive" => false,
        other => {
            return Err(Error::invalid(format!(
                "Parameter 'state' does not accept value '{other}'"
            ))
            .with_field("encrypt.state", other, "active, inactive"));
        }
    };
    let mut secret = |key: &str| {
        let id = options.take_str(key)?;
        id.map(|id| passphrase(secrets, Some(&id))).transpose()
    };
    let (new_secret, old_secret) = (secret("new-secret")?, secret("old-secret")?);
    Ok(SlotChange {
        activate,
        new_secret,
        old_secret,
        slot: take_number(&mut options, "keyslot")?,
        iter_time: take_number(&mut options, "iter-time")?,
        force,
    })
}

/// Does what `work` does to a buffer, on the workers if that takes long.
async fn transform(
    env: &Arc<dyn Environment>,
    mut buffer: Buffer,
    work: impl FnOnce(&mut [u8]) + Send + 'static,
) -> Result<Buffer> {
    if buffer.len() < OFFLOADED {
        work(&mut buffer);
        return Ok(buffer);
    }
    offload(env, move || {
        work(&mut buffer);
        buffer
    })
    .await
}

impl Qcow2 {
    /// Reads guest data that is stored at `host`, decrypted. `guest` is its place on the disk.
    pub async fn read_opened(
        &self,
        request: &Request,
        guest: u64,
        host: HostOffset,
        mut buf: IoBufMut,
    ) -> Result<()> {
        let data = self.data(request)?;
        let Some(encryption) = &self.encryption else {
            return read_host(data, host, buf).await;
        };
        let key = encryption.key()?;
        let mut done = 0;
        while !buf.is_empty() {
            let mut piece = buf.split_to(buf.len().min(PIECE));
            let len = piece.len();
            let at = HostOffset(host.0 + done);
            let (lent, bounce) = Buffer::try_new(len)?.lend();
            read_host(data, at, bounce).await?;
            let bounce = lent.reclaim().map_err(|_| kept())?;
            let (key, sector) = (key.clone(), encryption.sector(guest + done, at));
            let plain = transform(request.env(), bounce, move |bytes| {
                key.decrypt(sector, bytes);
            })
            .await?;
            piece.copy_from_slice(0, &plain);
            done += len as u64;
        }
        Ok(())
    }

    /// Writes guest data to `host`, encrypted. `guest` is its place on the disk.
    pub async fn write_sealed(
        &self,
        request: &Request,
        guest: u64,
        host: HostOffset,
        mut buf: IoBuf,
    ) -> Result<()> {
        let data = self.data(request)?;
        let Some(encryption) = &self.encryption else {
            return data.write(host.0, buf, RequestFlags::empty()).await;
        };
        let key = encryption.key()?;
        if !self.geometry.has_data_file() {
            encryption.check_target(host, buf.len() as u64)?;
        }
        let mut done = 0;
        while !buf.is_empty() {
            let piece = buf.split_to(buf.len().min(PIECE));
            let len = piece.len();
            let at = HostOffset(host.0 + done);
            let mut bounce = Buffer::try_new(len)?;
            piece.copy_to_slice(0, &mut bounce);
            let (key, sector) = (key.clone(), encryption.sector(guest + done, at));
            let sealed = transform(request.env(), bounce, move |bytes| {
                key.encrypt(sector, bytes);
            })
            .await?;
            data.write(at.0, sealed, RequestFlags::empty()).await?;
            done += len as u64;
        }
        Ok(())
    }

    /// Changes the key slots of a LUKS header; `options` are those below `encrypt`. `force` allows what may lose the last
    /// key.
    ///
    /// Cancellation: as a power cut; a password that opened the image before or that was added still does.
    ///
    /// # Errors
    /// EINVAL with qemu's words for what makes no sense or would lose the data; nothing was changed then.
    pub async fn amend_encryption(
        &self,
        request: &Request,
        options: Options,
        force: bool,
    ) -> Result<()> {
        self.check_writable()?;
        let Some(encryption) = &self.encryption else {
            return Err(Error::invalid(
                "Can't amend encryption options - encryption not present",
            ));
        };
        let Some(luks) = &encryption.luks else {
            return Err(Error::unsupported(
                "Only LUKS encryption options can be amended",
            ));
        };
        let master = luks.master.as_ref().ok_or_else(missing_key)?;
        self.metadata.check_sound()?;
        let change = slot_change(options, force, &encryption.secrets)?;
        let area = FileArea {
            file: request.file()?,
            pointer: luks.pointer,
        };
        let env = request.env();
        let mut header = luks.header.lock().await;
        let mut after = header.clone();
        let steps = luks::amend(env, &mut after, &area, master, &change).await?;
        // Whatever becomes of the steps, the header on disk is no longer the old one.
        let done = luks::run(env, &area, steps).await;
        *header = match &done {
            Ok(()) => after,
            Err(_) => read_luks(area.file, area.pointer).await?,
        };
        done
    }

    /// ENOTSUP for compressed writes into an encrypted image, unless the user has agreed to what becomes of them: the format
    /// knows compressed clusters as they are, and no encrypted ones.
    pub fn check_compressible(&self) -> Result<()> {
        match &self.encryption {
            Some(encryption) if !encryption.compressed_plaintext => Err(Error::unsupported(
                "Compression and encryption not supported at the same time (with the option encrypt.compressed-plaintext=on \
                 compressed clusters are stored unencrypted)",
            )),
            _ => Ok(()),
        }
    }
}

impl Encryption {
    /// Refuses to write guest data over the LUKS header: nothing could be read any more.
    fn check_target(&self, host: HostOffset, len: u64) -> Result<()> {
        if let Some(luks) = &self.luks
            && host.0 < luks.pointer.offset.saturating_add(luks.pointer.len)
            && luks.pointer.offset < host.0.saturating_add(len)
        {
            return Err(Error::corrupt(
                "Preventing invalid write on metadata (overlaps with LUKS header)",
            ));
        }
        Ok(())
    }
}

fn kept() -> Error {
    Error::io("a driver kept a part of a read buffer")
}
