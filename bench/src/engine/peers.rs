//! The other stores, each as its users would set it up for durable writes.

use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use super::load::{Client, Load, Next, SCAN_COUNT, Scanned, Tally, Values, key_of};
use crate::Failure;

/// What a store can do. Threads share it.
pub trait Store: Sync {
    /// Durable when it returns.
    fn put(&self, key: &str, value: &[u8]) -> Result<(), Failure>;
    /// All of them at once; durable after `sync`.
    fn put_many(&self, items: &[(String, Vec<u8>)]) -> Result<(), Failure>;
    /// What was put before is durable.
    fn sync(&self) -> Result<(), Failure>;
    /// Up to so many keys from this one on, in order, handed to `check` with their values.
    fn scan(&self, from: &str, count: usize, check: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Failure>;
    /// The value of a key, handed to `check`.
    fn get(&self, key: &str, check: &mut dyn FnMut(Option<&[u8]>)) -> Result<(), Failure>;
}

/// Opens a store by its name, with so many bytes of cache.
pub fn open(name: &str, directory: &Path, cache_size: u64) -> Result<Box<dyn Store>, Failure> {
    match name {
        "fjall" => Ok(Box::new(Fjall::open(directory, cache_size)?)),
        "redb" => Ok(Box::new(Redb::open(directory, cache_size)?)),
        #[cfg(feature = "rocksdb")]
        "rocksdb" => Ok(Box::new(Rocks::open(directory, cache_size)?)),
        other => Err(format!("no store is called {other}, or it was not built in").into()),
    }
}

/// Those that were built in.
pub fn names() -> Vec<&'static str> {
    let mut names = vec!["fjall", "redb"];
    if cfg!(feature = "rocksdb") {
        names.push("rocksdb");
    }
    names
}

/// Writes keys `0..count` once each, a thousand at a time, with a thread for each core.
pub fn load(store: &dyn Store, values: &Values, count: u64) -> Result<(), Failure> {
    const STEP: u64 = 1_000;
    for first in (0..count).step_by(STEP as usize) {
        let items: Vec<(String, Vec<u8>)> =
            (first..(first + STEP).min(count)).map(|number| (key_of(number), values.of(number))).collect();
        store.put_many(&items)?;
    }
    store.sync()
}

/// As many threads as clients, each of which waits for an answer before it asks again, for a while.
pub fn run(store: &dyn Store, values: &Values, load: &Load) -> Result<Tally, Failure> {
    let total = Mutex::new(Tally::new());
    let failed = Mutex::new(None);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for at in 0..load.clients {
            let (total, failed) = (&total, &failed);
            scope.spawn(move || {
                let mut client = Client::new(load, at);
                let mut tally = Tally::new();
                while begun.elapsed() < load.time {
                    let next = client.next(load);
                    let since = Instant::now();
                    if let Err(error) = one(store, values, load.keys, next) {
                        let mut first = failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                        first.get_or_insert_with(|| error.to_string());
                        return;
                    }
                    tally.add(next, since.elapsed());
                }
                total.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).merge(&tally);
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        return Err(error.into());
    }
    let mut total = total.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    total.seconds = begun.elapsed().as_secs_f64();
    Ok(total)
}

fn one(store: &dyn Store, values: &Values, keys: u64, next: Next) -> Result<(), Failure> {
    let read = |number: u64, is_there: bool| {
        let mut is_right = false;
        store.get(&key_of(number), &mut |value| {
            is_right =
                value.is_some_and(|value| values.is_of(number, value)) || (value.is_none() && !is_there);
        })?;
        if is_right { Ok(()) } else { Err(Failure::from(format!("key {number} was answered wrongly"))) }
    };
    match next {
        Next::Read(number) => read(number, true),
        Next::Miss(number) => read(number, false),
        Next::Scan(number) => {
            let mut scanned = Scanned::from(number);
            store.scan(&key_of(number), SCAN_COUNT, &mut |key, value| scanned.take(values, key, value))?;
            scanned.end(keys)
        }
        Next::Update(number) => store.put(&key_of(number), &values.of(number)),
        Next::ReadModifyWrite(number) => {
            read(number, true)?;
            store.put(&key_of(number), &values.of(number))
        }
    }
}

struct Fjall {
    database: fjall::Database,
    keyspace: fjall::Keyspace,
}

impl Fjall {
    fn open(directory: &Path, cache_size: u64) -> Result<Fjall, Failure> {
        let database = fjall::Database::builder(directory.join("fjall")).cache_size(cache_size).open()?;
        // Its write buffers are 64 MiB, several of them, and would be more than what it may have in all.
        let memtable_size = cache_size / 4;
        let options = move || fjall::KeyspaceCreateOptions::default().max_memtable_size(memtable_size);
        let keyspace = database.keyspace("bench", options)?;
        Ok(Fjall { database, keyspace })
    }
}

impl Store for Fjall {
    fn put(&self, key: &str, value: &[u8]) -> Result<(), Failure> {
        self.keyspace.insert(key, value)?;
        // What other threads inserted meanwhile is synced along, as its documentation suggests.
        Ok(self.database.persist(fjall::PersistMode::SyncData)?)
    }

    fn put_many(&self, items: &[(String, Vec<u8>)]) -> Result<(), Failure> {
        let mut batch = self.database.batch();
        for (key, value) in items {
            batch.insert(&self.keyspace, key.as_str(), value.as_slice());
        }
        Ok(batch.commit()?)
    }

    fn sync(&self) -> Result<(), Failure> {
        Ok(self.database.persist(fjall::PersistMode::SyncAll)?)
    }

    fn get(&self, key: &str, check: &mut dyn FnMut(Option<&[u8]>)) -> Result<(), Failure> {
        check(self.keyspace.get(key)?.as_deref());
        Ok(())
    }

    fn scan(&self, from: &str, count: usize, check: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Failure> {
        for one in self.keyspace.range(from..).take(count) {
            let (key, value) = one.into_inner()?;
            check(&key, &value);
        }
        Ok(())
    }
}

const TABLE: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("bench");

struct Redb(redb::Database);

impl Redb {
    fn open(directory: &Path, cache_size: u64) -> Result<Redb, Failure> {
        let file = directory.join("redb");
        let database = redb::Database::builder().set_cache_size(cache_size as usize).create(file)?;
        let write = database.begin_write()?;
        write.open_table(TABLE)?;
        write.commit()?;
        Ok(Redb(database))
    }
}

impl Store for Redb {
    fn put(&self, key: &str, value: &[u8]) -> Result<(), Failure> {
        let write = self.0.begin_write()?;
        write.open_table(TABLE)?.insert(key, value)?;
        Ok(write.commit()?)
    }

    fn put_many(&self, items: &[(String, Vec<u8>)]) -> Result<(), Failure> {
        let write = self.0.begin_write()?;
        {
            let mut table = write.open_table(TABLE)?;
            for (key, value) in items {
                table.insert(key.as_str(), value.as_slice())?;
            }
        }
        Ok(write.commit()?)
    }

    fn sync(&self) -> Result<(), Failure> {
        // Each commit was durable.
        Ok(())
    }

    fn get(&self, key: &str, check: &mut dyn FnMut(Option<&[u8]>)) -> Result<(), Failure> {
        use redb::ReadableDatabase;
        let table = self.0.begin_read()?.open_table(TABLE)?;
        let found = table.get(key)?;
        check(found.as_ref().map(redb::AccessGuard::value));
        Ok(())
    }

    fn scan(&self, from: &str, count: usize, check: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Failure> {
        use redb::ReadableDatabase;
        let table = self.0.begin_read()?.open_table(TABLE)?;
        for one in table.range(from..)?.take(count) {
            let (key, value) = one?;
            check(key.value().as_bytes(), value.value());
        }
        Ok(())
    }
}

#[cfg(feature = "rocksdb")]
struct Rocks(rocksdb::DB);

#[cfg(feature = "rocksdb")]
impl Rocks {
    fn open(directory: &Path, cache_size: u64) -> Result<Rocks, Failure> {
        let mut table = rocksdb::BlockBasedOptions::default();
        table.set_block_cache(&rocksdb::Cache::new_lru_cache(cache_size as usize));
        table.set_bloom_filter(10.0, false);
        table.set_cache_index_and_filter_blocks(true);
        let mut options = rocksdb::Options::default();
        options.create_if_missing(true);
        options.set_block_based_table_factory(&table);
        options.set_compression_type(rocksdb::DBCompressionType::None);
        options.set_write_buffer_size(16 << 20);
        options
            .increase_parallelism(std::thread::available_parallelism().map_or(2, |cores| cores.get() as i32));
        Ok(Rocks(rocksdb::DB::open(&options, directory.join("rocksdb"))?))
    }

    fn durable() -> rocksdb::WriteOptions {
        let mut options = rocksdb::WriteOptions::default();
        options.set_sync(true);
        options
    }
}

#[cfg(feature = "rocksdb")]
impl Store for Rocks {
    fn put(&self, key: &str, value: &[u8]) -> Result<(), Failure> {
        Ok(self.0.put_opt(key, value, &Self::durable())?)
    }

    fn put_many(&self, items: &[(String, Vec<u8>)]) -> Result<(), Failure> {
        let mut batch = rocksdb::WriteBatch::default();
        for (key, value) in items {
            batch.put(key, value);
        }
        Ok(self.0.write(batch)?)
    }

    fn sync(&self) -> Result<(), Failure> {
        Ok(self.0.flush_wal(true)?)
    }

    fn get(&self, key: &str, check: &mut dyn FnMut(Option<&[u8]>)) -> Result<(), Failure> {
        check(self.0.get_pinned(key)?.as_deref());
        Ok(())
    }

    fn scan(&self, from: &str, count: usize, check: &mut dyn FnMut(&[u8], &[u8])) -> Result<(), Failure> {
        let mut entries = self.0.raw_iterator();
        entries.seek(from);
        for _ in 0..count {
            let Some((key, value)) = entries.item() else { break };
            check(key, value);
            entries.next();
        }
        Ok(entries.status()?)
    }
}
