//! Reads training data as training would and says what it is and how fast it comes.
//!
//! ```sh
//! cargo run --release -p lapidary-engine --example data -- model_name=gemma4-e2b dataset_type=hf hf_path=json \
//!     hf_train_files=DATA.jsonl tokenizer_path=TOKENIZER.json max_target_length=2048 per_device_batch_size=8
//! ```
//!
//! Takes the words of a configuration. One pass over the data, without a model: batches of `per_device_batch_size` rows.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use lapidary_engine::data::{BatchSource, Prefetch, open_train};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let config = config::Sources::from_args(std::env::args().skip(1)).resolve()?;
    let rows = config.run.batch(1)?.load;
    let began = Instant::now();
    let source = open_train(&config, config.model.vocab_size, None, rows)?;
    println!("opened in {:.2} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    let mut source = Prefetch::new(source, 2);
    let mut weight = 0;
    for _ in 0..config.run.steps {
        let Some(batch) = source.next()? else { break };
        weight += batch.weight();
    }
    let seconds = began.elapsed().as_secs_f64();
    let report = source.report();
    println!(
        "{} batches, {} documents, {} tokens, {weight} targets, fill {:.2} %, {} cut, {} empty, {} bad",
        source.cursor().batches(),
        report.documents,
        report.tokens,
        report.fill_rate() * 100.0,
        report.truncated_documents,
        report.empty_documents,
        report.bad_documents
    );
    for bad in &report.first_bad {
        println!("  {bad}");
    }
    println!("{:.0} tokens/s ({seconds:.2} s)", report.tokens as f64 / seconds);
    println!("a cursor takes {} bytes", serde_json::to_vec(&source.cursor())?.len());
    Ok(())
}
